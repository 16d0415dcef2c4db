"""``torch._scaled_mm`` with a scale for each row and each column: the one place that knows its call."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]


def product(rows: Tensor, of_rows: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[M, N]``; its sums are in fp32, but for the tensor cores' own, which hold fewer bits."""
    return torch._scaled_mm(rows, codes.mT, of_rows, scales.mT, out_dtype=dtype, use_fast_accum=True)
