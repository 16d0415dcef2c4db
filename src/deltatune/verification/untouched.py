"""Leaving a model exactly as it was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from deltatune.compile.graphs import eager
from deltatune.state import State

__all__ = ["SLOW_DECAY", "compiled_as", "requiring_grad", "untouched"]

#: The A of the probe's recurrent layers, per-token decay ``exp(-A softplus(a + dt))``: slow enough that the state of
#: one document would be felt hundreds of tokens into the next.
SLOW_DECAY = 0.05

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Slow decay and no dropout inside; the model and the random number generators as before, after.

    Args:
        training: every module in training mode except dropout, or all of them in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    rotary = [_Kept(module) for module in modes if hasattr(module, "rope_type")]
    decays = {p: p.detach().clone() for name, p in model.named_parameters() if name.endswith("A_log")}
    with ExitStack() as stack:
        for device_type, indices in _accelerators(model).items():
            stack.enter_context(torch.random.fork_rng(indices, device_type=device_type))
        stack.enter_context(torch.random.fork_rng(()))
        stack.enter_context(torch.enable_grad())
        try:
            for module in modes:
                module.training = training and not isinstance(module, _DROPOUT)
            _write(decays, {p: torch.full_like(p, math.log(SLOW_DECAY)) for p in decays})
            yield
        finally:
            _write(decays, decays)
            for kept in rotary:
                kept.restore()
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters require a gradient inside."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def compiled_as(state: State | None, *, compiled: bool) -> AbstractContextManager[None]:
    """A prepared model's layers run eagerly inside unless ``compiled``; its graphs stay."""
    return nullcontext() if state is None or compiled else eager(state)


class _Kept:
    """A rotary embedding's attributes and buffers: of type ``dynamic`` or ``longrope`` it remembers long calls."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._attributes = module, dict(module.__dict__)
        self._buffers = [(name, b, None if b is None else b.clone()) for name, b in module._buffers.items()]

    def restore(self) -> None:
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        self._module._buffers.clear()
        for name, buffer, value in self._buffers:
            if buffer is not None and value is not None:
                buffer.copy_(value)
            self._module._buffers[name] = buffer


def _write(parameters: Iterable[nn.Parameter], values: dict[nn.Parameter, torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(values[parameter])


def _accelerators(model: nn.Module) -> dict[str, list[int]]:
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    found: dict[str, list[int]] = {}
    for device in devices:
        found.setdefault(device.type, []).append(device.index or 0)
    return found
