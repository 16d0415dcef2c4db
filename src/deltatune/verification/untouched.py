"""Leaving a model exactly as it was found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from deltatune.compile.graphs import eager
from deltatune.hf.model import device_of, in_mode
from deltatune.state import State

__all__ = ["SLOW_DECAY", "compiled_as", "layers_in_float32", "requiring_grad", "untouched"]

#: The A of the probe's recurrent layers, per-token decay ``exp(-A softplus(a + dt))``: slow enough that the state of
#: one document would be felt hundreds of tokens into the next.
SLOW_DECAY = 0.05


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Slow decay and no dropout inside; the model and the random number generators as before, after."""
    decays: dict[torch.Tensor, torch.Tensor] = {
        p: p.detach().clone() for name, p in model.named_parameters() if name.endswith("A_log")
    }
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(()))
        for device in {p.device for p in model.parameters() if p.device.type != "cpu"}:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        for rotary in (module for module in model.modules() if hasattr(module, "rope_type")):
            stack.enter_context(_forgetful(rotary))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(in_mode(model, training=training))
        for dropout in (module for module in model.modules() if isinstance(module, _DropoutNd)):
            dropout.training = False
        try:
            _write({p: torch.full_like(p, math.log(SLOW_DECAY)) for p in decays})
            yield
        finally:
            _write(decays)


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


@contextmanager
def layers_in_float32(model: nn.Module, text_model: Any, last: nn.Module) -> Iterator[None]:
    """The layers up to ``last`` and all around them run in float32 inside, by the references of the ops."""
    state, layers = text_model._deltatune, text_model.layers
    options, narrow = state.options, dict[torch.Tensor, torch.Tensor]()
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device_of(text_model).type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
        try:
            torch.set_float32_matmul_precision("highest")
            text_model.layers = layers[: [*layers].index(last) + 1]
            state.options = replace(options, kernels=dict.fromkeys(options.kernels, "reference"))
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.dtype in (torch.bfloat16, torch.float16):
                    narrow[tensor], tensor.data = tensor.data, tensor.data.float()
            yield
        finally:
            for tensor, data in narrow.items():
                tensor.data = data
            text_model.layers, state.options = layers, options
            torch.set_float32_matmul_precision(precision)


def compiled_as(state: State | None, *, compiled: bool) -> AbstractContextManager[object]:
    """A prepared model's layers run eagerly inside unless ``compiled``; its graphs stay."""
    return nullcontext() if state is None or compiled else eager(state)


@contextmanager
def _forgetful(rotary: nn.Module) -> Iterator[None]:
    """Attributes and buffers of a rotary embedding as before, after: of some types it remembers long calls."""
    attributes = {**rotary.__dict__, "_buffers": dict(rotary._buffers)}
    values = {buffer: buffer.clone() for buffer in rotary._buffers.values() if buffer is not None}
    try:
        yield
    finally:
        rotary.__dict__.clear()
        rotary.__dict__.update(attributes)
        _write(values)


def _write(values: Mapping[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(value)
