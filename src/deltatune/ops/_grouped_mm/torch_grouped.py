"""``torch.nn.functional.grouped_mm``: the one place that knows its limits."""

# R rows, G groups, K input width, N output width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._nvidia import gpu_refusal

__all__ = ["forward", "refusal", "weight_gradient"]

_OLDEST = (8, 0)
_MAX_GROUPS = 1023


def refusal(device: torch.device, dtype: torch.dtype, shape: torch.Size | None) -> str | None:
    """Why this implementation cannot run for a weight ``[G, N, K]`` here; None where it can."""
    missing = gpu_refusal("F.grouped_mm", device, _OLDEST)
    if missing is not None:
        return missing
    if dtype != torch.bfloat16:
        return f"F.grouped_mm takes bfloat16, not {dtype}; cast"
    if shape is not None and (shape[0] > _MAX_GROUPS or shape[1] % 8 or shape[2] % 8):
        return (
            f"F.grouped_mm takes up to {_MAX_GROUPS} groups and widths that are multiples of 8, "
            f"got a weight {list(shape)}"
        )
    return None


# Contiguous rows: an expanded gradient or a slice may break the 16-byte strides that the kernels need.


def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``[R, N]``, accumulated in fp32; rows past the last group, if there were any, would stay unwritten."""
    return F.grouped_mm(x.contiguous(), weight.mT, offs=offsets)


def weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``[G, N, K]`` in bf16, accumulated in fp32."""
    return F.grouped_mm(dy.contiguous().mT, x.contiguous(), offs=offsets)
