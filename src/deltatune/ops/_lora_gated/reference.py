"""The specification: two linear layers with adapters, and torch's own activation, which Inductor fuses in a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._lora_linear.api import Adapter, linear_with_lora

__all__ = ["activated", "activation_backward", "lora_gated"]


def lora_gated(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]], activation: str) -> Tensor:
    """``act(gate) * up``, each rounded to the dtype of ``x`` as its product with its adapters leaves it."""
    gate, up = linear_with_lora(x, weights, adapters)
    return activated(gate, activation) * up


def activated(x: Tensor, activation: str) -> Tensor:
    """``act(x)``."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def activation_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """``grad act'(x)``."""
    aten = torch.ops.aten
    silu = activation == "silu"
    found: Tensor = aten.silu_backward(grad, x) if silu else aten.gelu_backward(grad, x, approximate="tanh")
    return found
