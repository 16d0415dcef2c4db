"""Adapters that would break a layer's graph, found before the first step: one layer of each kind is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltatune.compile.graphs import fresh_code

__all__ = ["check_tuners"]


def check_tuners(text_model: Any, computed: Callable[[nn.Module], bool]) -> None:
    """Checks that every kind of adapter in the decoder layers compiles as one graph; nothing runs.

    Not of those that layers of ours compute with, as ``computed`` says.

    Raises:
        ValueError: one that does not, by kind, with its place and the compiler's reason.
    """
    kinds: dict[tuple[str, ...], tuple[str, nn.Module]] = {}
    for number, layer in enumerate(text_model.layers):
        for path, module in layer.named_modules():
            if "base_layer" in module._modules and hasattr(module, "active_adapters") and not computed(module):
                kinds.setdefault(_kind(module), (f"layers.{number}.{path}", module))
    for (name, *variants), (path, module) in kinds.items():
        reason = _break(module)
        if reason is not None:
            raise ValueError(
                f"adapters of kind {' with '.join((name, *variants))} (first at {path}) do not compile as one graph: "
                f"{reason}; use plain LoRA on linear layers, or CompileOptions(strict=False), where graph breaks are "
                "counted and not refused (compile.strict: false in a recipe)"
            )


def _kind(module: Any) -> tuple[str, ...]:
    """Its class, and the variants of its active adapters; layers of one kind compile alike."""
    variants = getattr(module, "lora_variant", {})
    active = {type(variants[name]).__name__ for name in module.active_adapters if name in variants}
    cls = type(module)
    return (f"{cls.__module__.removeprefix('peft.tuners.')}.{cls.__qualname__}", *sorted(active))


def _break(module: Any) -> str | None:
    """Why a layer does not compile as one graph; None where it does, or cannot be traced by itself."""
    if hasattr(module, "parameter_name"):
        return f"PEFT replaces the parameter {module.parameter_name} around every call"
    base = module.get_base_layer()
    inner = getattr(base, "in_features", None)
    # the base's own weight where that is not quantised
    weights = (getattr(base, "weight", None), *module.parameters())
    weight = next((w for w in weights if isinstance(w, torch.Tensor) and w.is_floating_point()), None)
    if inner is None or weight is None:
        return None

    def traced(layer: nn.Module, x: torch.Tensor) -> Any:
        return layer(x)

    x = torch.empty(1, 2, inner, dtype=weight.dtype, device=weight.device, requires_grad=True)
    function = torch.compile(fresh_code(traced, "traced adapter"), fullgraph=True, backend=_stop)
    try:
        function(module, x)
    except torch._dynamo.exc.Unsupported as error:
        return str(error).splitlines()[0]
    except torch._dynamo.exc.TorchDynamoException:
        return None  # captured, and stopped; or in want of something that a layer of a model has
    return None


def _stop(_graph: Any, _inputs: Any) -> Any:
    """A backend in which nothing runs: the graph was captured."""
    raise NotImplementedError
