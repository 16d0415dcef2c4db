"""The specification, with the rounding order of the stock module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["gated_rms_norm"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps)``, rounded to ``x.dtype``, times ``weight``, times ``silu(gate)`` in fp32."""
    acc_dtype = accumulation_dtype(x)
    wide = x.to(acc_dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scaled = weight * normed.to(x.dtype)
    return (scaled * F.silu(gate.to(acc_dtype))).to(x.dtype)
