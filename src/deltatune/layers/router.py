"""Routers of mixtures, whose logits leave a compiled layer where they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune.compile.graphs import FROZEN
from deltatune.state import bound
from deltatune.subclass import Swapped

__all__ = ["Router", "has_router", "recorded_routers", "recording", "run_recorded"]

#: Where a router finds the list that its logits go to, while a layer is traced.
_SINK: Final = "_deltatune_router_logits"

_logits: ContextVar[list[Tensor] | None] = ContextVar("deltatune_router_logits", default=None)


class Router(Swapped):
    """The stock router; what transformers would record with a hook, its logits, is also an output of the layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock router."""
        output = super().forward(*args, **kwargs)
        sink = self.__dict__.get(_SINK)
        if sink is not None:
            sink.append(output[0] if isinstance(output, tuple) else output)
        return output


def recorded_routers(text_model: Any) -> Iterator[nn.Module]:
    """The routers whose first output transformers records as ``router_logits``."""
    recorders = (getattr(text_model, "_can_record_outputs", None) or {}).get("router_logits", ())
    for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
        cls = getattr(recorder, "target_class", None)
        if isinstance(cls, type) and recorder.index == 0:
            for module in text_model.layers.modules():
                if issubclass(type(module), cls):
                    yield module


def has_router(module: nn.Module) -> bool:
    """Whether a layer's router logits can leave its graph."""
    return any(isinstance(part, Router) for part in module.modules())


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """A list that gets the router logits of every compiled layer inside the block, in their order."""
    found: list[Tensor] = []
    with bound(_logits, found):
        yield found


def run_recorded(
    run: Callable[..., Any], label: str, forward: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """``run(label, forward, layer, ...)``; while logits are recorded, those of this layer are added to the list."""
    found = _logits.get()
    if found is None or not has_router(layer):
        return run(label, forward, layer, *args, **kwargs)
    # inside a checkpointed region the list is written to when the layer runs, and not when it is recomputed
    frozen = FROZEN if label.endswith(FROZEN) else ""
    label = f"{label.removesuffix(FROZEN)} (router logits){frozen}"
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        output, logits = run(label, _with_router_logits(forward), layer, *args, **kwargs)
    found.extend(logits)
    return output


@functools.cache
def _with_router_logits(forward: Callable[..., Any]) -> Callable[..., tuple[Any, tuple[Tensor, ...]]]:
    """A layer's forward that also returns its routers' logits; one function for each, as graphs go by it."""

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        found: list[Tensor] = []
        routers = [part for part in module.modules() if isinstance(part, Router)]
        for router in routers:
            router.__dict__[_SINK] = found
        try:
            output = forward(module, *args, **kwargs)
        finally:
            for router in routers:
                router.__dict__.pop(_SINK, None)
        return output, tuple(found)

    return recorded
