"""Grouped matrix products in plain torch, where no row's result depends on the rows around it.

The order of additions inside a matrix product may depend on how many rows there are, so that a token's result would
change in its last bit when another document sends one more token to the same expert. Here every product has the same
shape: 32 rows at a time, the last ones padded with zeros.
"""

# R rows, G groups, K input width, N output width

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["forward", "weight_gradient"]

_BLOCK_ROWS = 32


def forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``y_r = weight_g x_r`` for the group g of row r, summed in fp32 (fp64 for fp64)."""
    ends = offsets.tolist()
    if (ends[-1] if ends else 0) != x.shape[0]:
        raise ValueError(
            f"grouped_mm: offsets must end at the number of rows: expected {x.shape[0]}, got {ends[-1:]}; "
            "give every row a group"
        )
    y = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            y[start:end] = _product_in_blocks(x[start:end], weight[group])
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


def _product_in_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    rows, dtype = x.shape[0], accumulation_dtype(x)
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, -rows % _BLOCK_ROWS))
    blocks = padded.view(-1, _BLOCK_ROWS, padded.shape[1])
    factor = matrix.to(dtype).mT
    return torch.cat([block @ factor for block in blocks])[:rows]
