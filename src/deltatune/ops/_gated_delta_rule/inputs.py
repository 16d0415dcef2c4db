"""What every implementation of the gated delta rule is given, and the gradients that it returns."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim, S sequences

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Gradients", "Inputs"]


class Inputs(NamedTuple):
    """The arguments of ``deltatune.ops.gated_delta_rule``, validated."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, G, V]
    g: Tensor  # [B, T, G]
    beta: Tensor  # [B, T, G]
    initial_state: Tensor | None  # [S, G, K, V]
    scale: float
    qk_l2norm: bool


class Gradients(NamedTuple):
    """Each in the shape and dtype of its input."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None = None  # where there is one
