"""Grouped matrix products in plain torch; on a CPU no row's result depends on the rows around it by a single bit.

A BLAS may add up a row's product in another order when there are more rows, when the row stands at another place among
them, or when it begins at another place of a cache line. So on a CPU every product is of one row, whose operands begin
at cache lines: the same call on the same numbers, whatever else is routed where. On a GPU, where a launch for each row
would cost too much, every product has one shape: 32 rows at a time, the last ones padded with zeros.
"""

# R rows, G groups, K input width, N output width, W width of the narrow rows

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["gram", "product"]

_BLOCK_ROWS = 32
_LINE_BYTES = 64


def product(x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None) -> Tensor:
    """``weight_g x_r (+ up_g narrow_r)`` for the group g of row r, summed in fp32 (fp64 for fp64); zero without one."""
    multiply = _product_by_rows if x.device.type == "cpu" else _product_in_blocks
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for group, (start, end) in enumerate(_groups(offsets, x.shape[0])):
        if end > start:
            rows = multiply(x[start:end], weight[group])
            if narrow is not None and up is not None:
                rows = rows + multiply(narrow[start:end], up[group])
            y[start:end] = rows
    return y


def gram(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum over the rows of g of left_r right_r^T`` ``[G, P, Q]``, summed likewise."""
    wide = accumulation_dtype(left)
    sums = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1], dtype=dtype)
    for group, (start, end) in enumerate(_groups(offsets, left.shape[0])):
        if end > start:
            sums[group] = left[start:end].to(wide).mT @ right[start:end].to(wide)
    return sums


def _groups(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    ends = [0, *offsets.tolist()]
    if ends != sorted(ends) or ends[-1] > rows:
        raise ValueError(
            f"grouped_linear: offsets must not decrease nor end past the last row: expected at most {rows}, "
            f"got {ends[1:]}"
        )
    return list(pairwise(ends))


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
