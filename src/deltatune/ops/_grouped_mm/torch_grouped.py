"""``torch.nn.functional.grouped_mm``: the one place that knows its limits."""

# R rows, G groups, K input width, N output width, W width of the narrow rows

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._nvidia import capability_of, dotted, gpu_refusal

__all__ = ["MAX_GROUPS", "dense", "gram", "product", "refusal"]

#: Elsewhere it copies the offsets to the host and launches one product a group.
_FUSED = (9, 10)
MAX_GROUPS = 1023


def refusal(device: torch.device, dtype: torch.dtype, shape: torch.Size | None) -> str | None:
    """Why this implementation cannot run for a weight ``[G, N, K]`` here; None where it can."""
    missing = gpu_refusal("F.grouped_mm", device)
    if missing is not None:
        return missing
    capability = capability_of(device)
    if capability is not None and capability[0] not in _FUSED:
        return f"F.grouped_mm waits for the host on compute capability {dotted(capability)}"
    if dtype != torch.bfloat16:
        return f"F.grouped_mm takes bfloat16, not {dtype}; cast"
    if shape is not None and (shape[0] > MAX_GROUPS or shape[1] % 8 or shape[2] % 8):
        return (
            f"F.grouped_mm takes up to {MAX_GROUPS} groups and widths that are multiples of 8, "
            f"got a weight {list(shape)}"
        )
    return None


# Contiguous rows: an expanded gradient or a slice may break the 16-byte strides that the kernels need.


def product(x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None) -> Tensor:
    """``[R, N]``, accumulated in fp32; without narrow rows those past the last group stay unwritten."""
    if narrow is not None:
        # H200, up of gpt-oss-20b, 16384 tokens: 3.23 ms as one sum, 3.86 as two products and an addition
        from deltatune.ops._grouped_mm import triton_grouped

        return triton_grouped.product(x, weight, offsets, narrow, up)
    return F.grouped_mm(x.contiguous(), dense(weight).mT, offs=offsets)


def dense(matrices: Tensor) -> Tensor:
    """With rows or columns next to each other."""
    return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()


def gram(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[G, P, Q]``, accumulated in fp32; torch's own gives no other dtype than that of its operands."""
    if dtype == left.dtype:
        return F.grouped_mm(left.contiguous().mT, right.contiguous(), offs=offsets)
    from deltatune.ops._grouped_mm import triton_grouped

    return triton_grouped.gram(left, right, offsets, dtype)
