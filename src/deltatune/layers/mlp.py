"""The gated MLP whose two input projections share what their adapters do to the input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.hf.hooks import is_hooked
from deltatune.lora.linear import LoRALinear, project
from deltatune.subclass import Swapped, stock_class

__all__ = ["GatedMLP", "is_gated_mlp"]

# transformers classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)), by module of their family
_CLASSES = {
    "llama": "LlamaMLP",
    "mistral": "MistralMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
    "qwen3_moe": "Qwen3MoeMLP",
    "qwen3_next": "Qwen3NextMLP",
    "qwen3_5": "Qwen3_5MLP",
    "qwen3_5_moe": "Qwen3_5MoeMLP",
}
_SILU = {("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation")}


class GatedMLP(Swapped):
    """``down(act(gate(x)) * up(x))``."""

    #: children that read the same input
    shared_inputs = (("gate_proj", "up_proj"),)
    #: their gradients come out of the activation's backward, elementwise
    pointwise_gradients = True
    #: children that read the gated activation
    gated_inputs = ("down_proj",)

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E] -> [..., E]``."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        down = self.down_proj
        if _is_silu(self.act_fn) and isinstance(down, LoRALinear) and down.takes_gated(gate):
            y: Tensor = down.gated(gate, up)
        else:
            y = down(self.act_fn(gate) * up)
        return y


def _is_silu(function: Any) -> bool:
    """Whether the activation is SiLU and nothing else, so that it need not be called."""
    if not isinstance(function, nn.Module):
        return function is F.silu
    cls = type(function)
    return (cls.__module__, cls.__qualname__) in _SILU and not is_hooked(function)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether this is a stock module of the kind."""
    cls = stock_class(module)
    family = cls.__module__.removeprefix("transformers.models.").partition(".")[0]
    return cls.__module__.startswith("transformers.models.") and _CLASSES.get(family) == cls.__qualname__
