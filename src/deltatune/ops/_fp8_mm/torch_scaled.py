"""``torch._scaled_mm`` and its grouped form, with a scale for each row and column: the one place that knows them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]


def product(
    rows: Tensor, of_rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``[M, N]``; its sums are in fp32, but for the tensor cores' own, which hold fewer bits.

    Rows past the last group stay unwritten.
    """
    if offsets is None:
        return torch._scaled_mm(rows, codes.mT, of_rows, scales.mT, out_dtype=dtype, use_fast_accum=True)
    return torch._scaled_grouped_mm(
        rows, codes.mT, of_rows.view(-1), scales.squeeze(-1), offs=offsets, out_dtype=dtype, use_fast_accum=True
    )
