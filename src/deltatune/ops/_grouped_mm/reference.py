"""Grouped matrix products in plain torch; on a CPU no row's result depends on the rows around it by a single bit.

A BLAS may add up a row's product in another order when there are more rows, when the row stands at another place among
them, or when it begins at another place of a cache line. So on a CPU every product is of one row, whose operands begin
at cache lines: the same call on the same numbers, whatever else is routed where. On a GPU, where a launch for each row
would cost too much, every product has one shape: 32 rows at a time, the last ones padded with zeros.
"""

# R rows, G groups, K input width, N output width

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["forward", "weight_gradient"]

_BLOCK_ROWS = 32
_LINE_BYTES = 64


def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``y_r = weight_g x_r`` for the group g of row r, summed in fp32 (fp64 for fp64)."""
    ends = offsets.tolist()
    if (ends[-1] if ends else 0) != x.shape[0]:
        raise ValueError(
            f"grouped_mm: offsets must end at the number of rows: expected {x.shape[0]}, got {ends[-1:]}; "
            "give every row a group"
        )
    product = _product_by_rows if x.device.type == "cpu" else _product_in_blocks
    y = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            y[start:end] = product(x[start:end], weight[group])
        start = end
    return y


def weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``dweight_g = sum over the rows of g of dy_r x_r^T`` ``[G, N, K]``, accumulated likewise."""
    dtype = accumulation_dtype(x)
    dweight = x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            dweight[group] = dy[start:end].to(dtype).mT @ x[start:end].to(dtype)
        start = end
    return dweight


def _product_by_rows(x: Tensor, matrix: Tensor) -> Tensor:
    dtype = accumulation_dtype(x)
    factor = matrix.to(dtype).contiguous()
    rows = _at_cache_lines(x, x.shape[1], dtype).copy_(x)
    y = _at_cache_lines(x, matrix.shape[0], dtype)
    for row, out in zip(rows.unbind(), y.unbind(), strict=True):
        torch.mv(factor, row, out=out)
    return y


def _at_cache_lines(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[rows of x, width]``, each row of which begins where a cache line does, as all tensors of torch do."""
    step = _LINE_BYTES // dtype.itemsize
    return x.new_zeros(x.shape[0], -(-width // step) * step, dtype=dtype)[:, :width]


def _product_in_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    rows, dtype = x.shape[0], accumulation_dtype(x)
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, -rows % _BLOCK_ROWS))
    blocks = padded.view(-1, _BLOCK_ROWS, padded.shape[1])
    factor = matrix.to(dtype).mT
    return torch.cat([block @ factor for block in blocks])[:rows]
