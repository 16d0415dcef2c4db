"""The gated MLP whose two input projections share what their adapters do to the input."""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch import Tensor, nn

from deltatune.hf.hooks import is_hooked
from deltatune.lora.linear import project
from deltatune.subclass import Swapped

__all__ = ["GatedMLP", "is_gated_mlp"]

_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}


class GatedMLP(Swapped):
    """``down(act(gate(x)) * up(x))``."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E] -> [..., E]``."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        y: Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


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
