"""``torch.nn.functional.grouped_mm``: the one place that knows its limits."""

# R rows, G groups, K input width, N output width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._nvidia import capability_of, dotted, gpu_refusal

__all__ = ["forward", "refusal", "weight_gradient"]

_function = getattr(F, "grouped_mm", None)
_MAX_GROUPS = 1023


def refusal(device: torch.device, dtype: torch.dtype, shape: torch.Size | None) -> str | None:
    """Why this implementation cannot run for a weight ``[G, N, K]`` here; None where it can."""
    if _function is None:
        return f"torch {torch.__version__} has no F.grouped_mm; install torch >= 2.11"
    missing = gpu_refusal("F.grouped_mm", device)
    if missing is not None:
        return missing
    if dtype != torch.bfloat16:
        return f"F.grouped_mm takes bfloat16, not {dtype}; cast"
    if shape is not None and (shape[0] > _MAX_GROUPS or shape[1] % 8 or shape[2] % 8):
        return (
            f"F.grouped_mm takes up to {_MAX_GROUPS} groups and widths that are multiples of 8, "
            f"got a weight {list(shape)}"
        )
    capability = capability_of(device)
    if capability is not None and capability < (8, 0):
        return f"F.grouped_mm needs compute capability 8.0 or newer, this GPU has {dotted(capability)}"
    return None


def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``[R, N]``, accumulated in fp32; rows past the last group, if there were any, would stay unwritten."""
    assert _function is not None
    y: Tensor = _function(_aligned(x), weight.mT, offs=offsets)
    return y


def weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``[G, N, K]`` in bf16, accumulated in fp32."""
    assert _function is not None
    dweight: Tensor = _function(_aligned(dy).mT, _aligned(x), offs=offsets)
    return dweight


def _aligned(x: Tensor) -> Tensor:
    """Contiguous rows: an expanded gradient or a slice may break the 16-byte strides that the kernels need."""
    return x.contiguous()
