"""``y = x * rsqrt(sum(x^2) + eps)`` over the last dim and its gradient, one Triton kernel each.

Reads any strides of tokens and heads, so views of one projection need no copy. Imported only where it runs.
"""

# N tokens, H heads, K head dim

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._numerics import L2_EPS

__all__ = ["normalise", "normalise_backward"]

_ROWS = 16  # of K numbers, a program


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """``y`` like ``x`` ``[N, H, K]``, contiguous, and ``rsqrt(sum(x^2) + eps)`` ``[N, H]`` in fp32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(tokens, heads, dtype=torch.float32, device=x.device)
    _forward_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        x, y, rstd, x.stride(0), x.stride(1), tokens * heads, heads, dim, L2_EPS, _ROWS, triton.next_power_of_2(dim)
    )
    return y, rstd


def normalise_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    """``dx = (dy - y (y . dy)) * rstd``; all ``[N, H, K]`` and contiguous but ``rstd`` ``[N, H]``."""
    tokens, heads, dim = y.shape
    dx = torch.empty_like(y)
    _backward_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        dy, y, rstd, dx, tokens * heads, dim, _ROWS, triton.next_power_of_2(dim)
    )
    return dx


def _forward(
    x: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    num_rows: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, DIM)
    inside = (rows < num_rows)[:, None] & (cols < K)[None, :]
    at = (rows // H * token_stride + rows % H * head_stride)[:, None] + cols[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) + EPS)
    tl.store(y + rows[:, None] * K + cols[None, :], values * inverse[:, None], mask=inside)
    tl.store(rstd + rows, inverse, mask=rows < num_rows)


def _backward(
    dy: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, DIM)
    inside = (rows < num_rows)[:, None] & (cols < K)[None, :]
    at = rows[:, None] * K + cols[None, :]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
    dot = tl.sum(grad * unit, axis=1)
    tl.store(dx + at, (grad - unit * dot[:, None]) * inverse[:, None], mask=inside)


_forward_kernel, _backward_kernel = triton.jit(_forward), triton.jit(_backward)
