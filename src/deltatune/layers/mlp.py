"""The gated MLP whose two input projections share what their adapters do to the input."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import ops
from deltatune.hf.activations import activation_of
from deltatune.hf.hooks import is_hooked
from deltatune.lora.linear import LoRALinear, gated, project, without_bias
from deltatune.lora.mode import FUSED, mode_of
from deltatune.ops import Spec
from deltatune.quantization.tensor import computes_in_fp8
from deltatune.subclass import Swapped

__all__ = ["GatedMLP", "is_gated_mlp"]

_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


class GatedMLP(Swapped):
    """``down(act(gate(x)) * up(x))``."""

    ops = ("lora_gated",)

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E] -> [..., E]``."""
        activation, h = activation_of(self.act_fn), None
        if activation is not None:
            impl = self._deltatune.options.kernels["lora_gated"]
            h = gated(x, self.gate_proj, self.up_proj, activation, impl=impl)
        if h is None:
            gate, up = project(x, self.gate_proj, self.up_proj)
            h = self.act_fn(gate) * up
        y: Tensor = self.down_proj(h)
        return y

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the gate, where both projections in front of it have adapters that are part of their products."""
        layers = module.gate_proj, module.up_proj
        if activation_of(module.act_fn) is None or not all(_runs_fused(layer, device, dtype) for layer in layers):
            return ()
        ranks = [sum(adapter.down.shape[0] for adapter in layer.adapters()) for layer in layers]
        return (ops.LoraGatedSpec(device, dtype, width=max(ranks)),)


def _runs_fused(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    if not isinstance(layer, LoRALinear) or is_hooked(layer) or not without_bias(layer):
        return False
    if computes_in_fp8(layer.base_layer.weight):
        return False
    state = layer._deltatune
    mode = mode_of(layer, state.options.lora, dtype=dtype, gathered_in=state.facts.gathered_in, device=device)
    return mode.name == FUSED


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a stock module's forward is written as ``GatedMLP``'s formula, so that ours may run in its place.

    The same instructions over the same names are the same function, in training and on any weights, where values that
    were tried would miss a dropout or a clamp; what is written another way is called as it is. Names of arguments and
    of what is computed on the way may differ.
    """
    if any(map(is_hooked, module.modules())) or not module._modules.keys() >= _PROJECTIONS:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and _instructions(code) in map(_instructions, _WRITTEN)


def _instructions(code: CodeType) -> tuple[object, ...]:
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_nlocals, code.co_freevars


def _kept(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y


def _returned(self: Any, x: Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


#: The formula as stock classes write it, compiled by the Python that compiles them.
_WRITTEN = (_kept.__code__, _returned.__code__)
