"""The product in fp32 of what the codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._grouped_mm import reference as grouped
from deltatune.ops._grouped_mm.linear import columns_of

__all__ = ["product"]


def product(
    rows: Tensor, of_rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``[M, N]``; a group's rows as the reference of grouped products multiplies them."""
    left, right = rows.to(torch.float32), codes.to(torch.float32)
    summed = left @ right.mT if offsets is None else grouped.product(left, right, offsets, None, None)
    return (summed * of_rows * columns_of(scales, offsets, rows.shape[0])).to(dtype)
