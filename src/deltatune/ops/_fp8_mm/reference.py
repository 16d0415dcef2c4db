"""The product in fp32 of what the codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]


def product(rows: Tensor, of_rows: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[M, N]``."""
    summed = rows.to(torch.float32) @ codes.to(torch.float32).mT
    return (summed * of_rows * scales.mT).to(dtype)
