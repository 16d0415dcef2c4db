"""``y = x * rsqrt(mean(x^2) + eps) * w * silu(g)`` over the last dim and its gradient, one Triton kernel each.

Forward reads 2 SND and writes SND, backward reads 3 SND and writes 2 SND: nothing but x and the gate is kept. Any
strides of tokens and heads, so views of one projection need no copy. Imported only where it runs.
"""

# S tokens, N heads, D the dim that is normalised

from __future__ import annotations

import triton
import triton.language as tl

from deltatune.ops._jit import DTYPES, jit

__all__ = ["DTYPES", "TILES", "WARPS", "backward_kernel", "forward_kernel", "tile"]

# Numbers a program holds of each tensor, and warps. H200, bf16, 16384 tokens, 16 heads of 128: with 2048 equal within
# noise forward and 1% to 3% slower backward, with 8192 and 8 warps 14% to 23% slower forward.
_ELEMENTS, WARPS = 1024, 4
# Tiles of rows one program sums for the weight's gradient. There: 1.05x as fast as 2048 numbers and 16 tiles.
TILES = 8


def tile(dim: int) -> tuple[int, int]:
    """Rows that a program holds at a time, and the power of two that a row fits in."""
    width: int = triton.next_power_of_2(dim)
    return max(1, _ELEMENTS // width), width


@jit
def _load(pointer: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@jit
def forward_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    x_strides: tl.tuple,
    gate_strides: tl.tuple,
    num_rows: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.broadcast_to(tl.arange(0, DIM)[None, :], [ROWS, DIM])
    mask = (rows < num_rows)[:, None] & (cols < D)
    tokens, heads = (rows // N).to(tl.int64), (rows % N).to(tl.int64)
    value = _load(x, (tokens * x_strides[0] + heads * x_strides[1])[:, None] + cols, mask)
    opened = _load(gate, (tokens * gate_strides[0] + heads * gate_strides[1])[:, None] + cols, mask)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1) / D + EPS)[:, None]
    # each rounding of the stock module, in its order
    normed = (value * rstd).to(x.dtype.element_ty).to(tl.float32)
    scaled = (normed * _load(weight, cols, cols < D)).to(SCALED).to(tl.float32)
    tl.store(y + rows.to(tl.int64)[:, None] * D + cols, scaled * (opened * tl.sigmoid(opened)), mask=mask)


@jit
def backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    dgate: tl.tensor,
    sums: tl.tensor,
    grad_strides: tl.tuple,
    x_strides: tl.tuple,
    gate_strides: tl.tuple,
    num_rows: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    cols = tl.broadcast_to(tl.arange(0, DIM)[None, :], [ROWS, DIM])
    scale = _load(weight, cols, cols < D)
    if WEIGHT_GRAD:
        total = tl.zeros([ROWS, DIM], tl.float32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        live = rows < num_rows
        mask = live[:, None] & (cols < D)
        tokens, heads = (rows // N).to(tl.int64), (rows % N).to(tl.int64)
        value = _load(x, (tokens * x_strides[0] + heads * x_strides[1])[:, None] + cols, mask)
        opened = _load(gate, (tokens * gate_strides[0] + heads * gate_strides[1])[:, None] + cols, mask)
        dy = _load(grad, (tokens * grad_strides[0] + heads * grad_strides[1])[:, None] + cols, mask)
        # a row past the end has rstd 0, so that it adds nothing to the weight's gradient whatever eps is
        rstd = tl.where(live, tl.rsqrt(tl.sum(value * value, axis=1) / D + EPS), 0.0)[:, None]
        share = tl.sigmoid(opened)
        unit = value * rstd
        # y = unit w silu(g), silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
        passed = dy * opened * share
        pushed = dy * unit * scale * share * (1.0 + opened * (1.0 - share))
        # dx = rstd (u - unit mean(u unit)) with u = w * passed
        scaled = passed * scale
        pull = (tl.sum(scaled * unit, axis=1) / D)[:, None]
        out_at = rows.to(tl.int64)[:, None] * D + cols
        tl.store(dx + out_at, (scaled - unit * pull) * rstd, mask=mask)
        tl.store(dgate + out_at, pushed, mask=mask)
        if WEIGHT_GRAD:
            total += passed * unit
    if WEIGHT_GRAD:
        cols = tl.arange(0, DIM)
        tl.store(sums + program.to(tl.int64) * D + cols, tl.sum(total, axis=0), mask=cols < D)
