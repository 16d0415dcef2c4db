"""The gated MLP whose two input projections share what their adapters do to the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.hf.hooks import is_hooked
from deltatune.hf.model import in_mode
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
    """Whether a stock module has these parts alone, and computes this with them: one token tells."""
    parts = set(module._modules)
    if not (_PROJECTIONS <= parts <= _PROJECTIONS | {"act_fn"} and hasattr(module, "act_fn")):
        return False
    weights = [weight for weight in module.parameters() if weight.is_floating_point()]
    if module._parameters or not weights or any(map(is_hooked, module.modules())):
        return False
    if weights[0].is_meta:
        return True
    mlp: Any = module
    x = torch.linspace(-1, 1, mlp.gate_proj.in_features, dtype=weights[0].dtype, device=weights[0].device)[None]
    with in_mode(module, training=False), torch.no_grad():
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return bool(torch.allclose(mlp(x), expected))
