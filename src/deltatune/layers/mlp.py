"""The gated MLP whose two input projections share what their adapters do to the input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltatune.lora.linear import project
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
    """Whether this is a stock module of the kind."""
    cls = stock_class(module)
    family = cls.__module__.removeprefix("transformers.models.").partition(".")[0]
    return cls.__module__.startswith("transformers.models.") and _CLASSES.get(family) == cls.__qualname__
