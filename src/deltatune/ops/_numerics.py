"""What several ops compute with: one place for each convention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["L2_EPS", "accumulation_dtype", "autocast", "most_demanding", "unit_stride"]

#: of an l2 norm, inside the square root: ``x * rsqrt(sum(x^2) + 1e-6)``
L2_EPS = 1e-6


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """What numbers of these dtypes are multiplied and summed in: fp64 where any is fp64, otherwise fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as torch treats its own matrix products; fp64 is left alone."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def most_demanding(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that fewest devices and kernels take: fp64 before bf16 before what the others promote to.

    Not what they promote to: a kernel that reads bf16 and fp32 needs a GPU that knows bf16.
    """
    for rare in (torch.float64, torch.bfloat16):
        if rare in dtypes:
            return rare
    return functools.reduce(torch.promote_types, dtypes)


def unit_stride(x: Tensor) -> Tensor:
    """The same numbers, those of the last dim next to each other: what kernels ask that read any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()
