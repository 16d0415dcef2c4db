"""Quack's grouped product of experts without adapters: the one place that knows its calls.

Products with adapters stay with the Triton kernel, which adds the narrow rows in the same sum; so do narrow products
themselves, and sums over rows.
"""

# R rows, G groups, K input width, N output width, W width of the narrow rows

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from deltatune.ops._grouped_mm.torch_grouped import dense
from deltatune.ops._nvidia import capability_of, constant, dotted, gpu_refusal, version_of

__all__ = ["gram", "product", "refusal"]

_OLDEST: Final = Version("0.6.5")
_CAPABILITY: Final = (9, 0)  # what it was measured on
_DTYPES: Final = (torch.bfloat16, torch.float16)
_NARROW: Final = 64  # columns of a matrix, in or out, below which it is an adapter's


def refusal(device: torch.device, dtype: torch.dtype, shape: torch.Size | None) -> str | None:
    """Why this implementation cannot run for a weight ``[G, N, K]`` here; None where it can."""
    missing = gpu_refusal("quack", device)
    if missing is not None:
        return missing
    if dtype not in _DTYPES:
        return f"quack's product takes bfloat16 and float16, not {dtype}; cast"
    if shape is not None and (shape[1] % 8 or shape[2] % 8):
        return f"quack's product takes widths that are multiples of 8, got a weight {list(shape)}"
    return _unfit(device)


@constant
def _unfit(device: torch.device) -> str | None:
    capability = capability_of(device)
    if capability is not None and capability != _CAPABILITY:
        return f"quack's product needs compute capability {dotted(_CAPABILITY)}, this GPU has {dotted(capability)}"
    version = version_of("quack-kernels")
    if version is not None and version >= _OLDEST:
        return None
    found = "is not installed" if version is None else f"{version} is older than {_OLDEST}"
    return f"quack {found}: pip install 'quack-kernels[cu13]>={_OLDEST}'"


def product(x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None) -> Tensor:
    """``[R, N]``, accumulated in fp32; rows past the last group stay unwritten, or are zero."""
    if narrow is not None or min(weight.shape[1:]) < _NARROW:
        from deltatune.ops._grouped_mm import triton_grouped

        return triton_grouped.product(x, weight, offsets, narrow, up)
    y = x.new_empty(x.shape[0], weight.shape[1])
    if y.numel():
        library: Any = importlib.import_module("quack.gemm_interface")
        # its tuner would build some twenty kernels for each shape before the first step
        library.gemm(x.contiguous(), dense(weight).mT, out=y, cu_seqlens_m=F.pad(offsets, (1, 0)), tuned=False)
    return y


def gram(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[G, P, Q]``, accumulated in fp32."""
    from deltatune.ops._grouped_mm import triton_grouped

    return triton_grouped.gram(left, right, offsets, dtype)
