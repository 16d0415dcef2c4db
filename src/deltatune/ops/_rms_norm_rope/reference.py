"""The specification, with the rounding order of the stock modules."""

# B batch, T tokens, N heads, D head dim, R rotary dim

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["result_dtype", "rms_norm_rope", "rotate", "scaled_dtype"]


def rms_norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """``rotate(RMSNorm(x) * weight)``, with ``rotate(a, b) = (a cos - b sin, b cos + a sin)`` on halves of R dims."""
    return rotate(_rms_norm(x, weight, eps, unit_offset), cos, sin)


def scaled_dtype(x: Tensor, weight: Tensor | None, unit_offset: bool) -> torch.dtype:
    """What a head is rounded to between its scale and its rotation."""
    return x.dtype if weight is None or unit_offset else torch.promote_types(x.dtype, weight.dtype)


def result_dtype(x: Tensor, weight: Tensor | None, cos: Tensor, unit_offset: bool) -> torch.dtype:
    """What the scaled head and cos promote to."""
    return torch.promote_types(scaled_dtype(x, weight, unit_offset), cos.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if unit_offset:
        # (1 + w) is taken in fp32: in bf16 it would lose every w below 2^-8
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone, of ``x [B, T, N, D]``."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary = cos.shape[-1]
    turning, passing = x[..., :rotary], x[..., rotary:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, passing.to(turned.dtype)], dim=-1)
