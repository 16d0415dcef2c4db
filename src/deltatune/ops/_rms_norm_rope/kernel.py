"""``y = rope(x * rsqrt(mean(x^2) + eps) * w)`` and its gradient, one Triton kernel each.

A program takes a few heads of q or a few of k, so both share one launch. A head is held as pairs ``(a, b)``: first the
R/2 that rotate, then the dims that pass, paired anyhow and turned by nothing; so no element is read twice. Forward
reads SND and writes SND for each tensor, backward reads 2 SND and writes SND. Any strides of tokens and heads: views
of one projection need no copy. Imported only where it runs.
"""

# S tokens of all rows, P positions of cos and sin (S, or T where one row serves all), N heads, D head dim, R rotary dim

from __future__ import annotations

import triton
import triton.language as tl

from deltatune.ops._jit import DTYPES, jit

__all__ = ["DTYPES", "WARPS", "backward_kernel", "forward_kernel", "tiles"]

# Numbers a program holds of each tensor, and warps. H200, bf16, 16384 tokens, 40/8 heads of 128 and 16/4 of 256: from
# 1024 to 4096 with 4 warps within 4% of each other both ways, 8192 with 8 warps 11% to 14% slower forward.
_ELEMENTS, WARPS = 2048, 4
# With a weight's gradient, whose sums take registers too; and the tiles one program sums. There: 1.07x and 1.06x as
# fast as 2048 numbers and 16 tiles, 1.04x and 1.09x as fast as 8 tiles.
_SUMMED_ELEMENTS, _TILES = 1024, 16


def tiles(dim: int, *, weight_grad: bool = False) -> tuple[int, int, int]:
    """Tiles of a program, heads of a tile, and the power of two that the pairs of a head fit in."""
    elements, num_tiles = (_SUMMED_ELEMENTS, _TILES) if weight_grad else (_ELEMENTS, 1)
    rows: int = max(1, elements // triton.next_power_of_2(dim))
    pairs: int = triton.next_power_of_2((dim + 1) // 2)
    return num_tiles, rows, pairs


@jit
def _load(pointer: tl.tensor, at: tl.tensor, mask: tl.tensor, other: tl.constexpr) -> tl.tensor:
    return tl.load(pointer + at, mask=mask, other=other).to(tl.float32)


@jit
def _rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    return x.to(DTYPE).to(tl.float32)


@jit
def _scale_and_round(
    x: tl.tensor, weight: tl.tensor, SCALE: tl.constexpr, NORMED: tl.constexpr, SCALED: tl.constexpr
) -> tl.tensor:
    if SCALE == 2:
        return _rounded(x * (1.0 + weight), NORMED)
    y = _rounded(x, NORMED)
    if SCALE == 1:
        y = _rounded(y * weight, SCALED)
    return y


@jit
def _pair_columns(D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr) -> tl.tuple:
    # a and b of each pair: (0, R/2), (1, R/2 + 1), ...; then what passes, (R, R + (D-R)/2), ...; which a and which b
    # there are, and which pairs rotate.
    # Of every row, so that the weight is loaded in the layout of x: another layout costs shared memory and barriers.
    pair = tl.broadcast_to(tl.arange(0, PAIRS)[None, :], [ROWS, PAIRS])
    turns = pair < R // 2
    a = tl.where(turns, pair, pair + R // 2)
    b = tl.where(turns, pair + R // 2, pair + R // 2 + (D - R + 1) // 2)
    return a, b, a < R + (D - R + 1) // 2, b < D, turns


@jit
def _tile_heads(tile: tl.tensor, num_tokens: tl.tensor, N: tl.constexpr, ROWS: tl.constexpr) -> tl.tuple:
    # the rows of a tile, which of them there are, and the token and the head that each is
    rows = tile * ROWS + tl.arange(0, ROWS)
    return rows, rows < num_tokens * N, rows // N, rows % N


@jit
def _row_starts(tokens: tl.tensor, heads: tl.tensor, strides: tl.tuple) -> tl.tensor:
    # in 64 bits: heads may lie further apart than tokens, and both further than 2^31 elements
    return (tokens.to(tl.int64) * strides[0] + heads.to(tl.int64) * strides[1])[:, None]


@jit
def _angle_starts(tokens: tl.tensor, num_positions: tl.tensor, strides: tl.tuple) -> tl.tuple:
    positions = (tokens % num_positions).to(tl.int64)
    return (positions * strides[0])[:, None], (positions * strides[1])[:, None]


@jit
def _forward_tile(
    tensors: tl.tuple,
    strides: tl.tuple,
    angles: tl.tuple,
    angle_strides: tl.tuple,
    num_tokens: tl.tensor,
    num_positions: tl.tensor,
    program: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    x, y, weight = tensors
    cos, sin = angles
    NORMED: tl.constexpr = x.dtype.element_ty
    OUT: tl.constexpr = y.dtype.element_ty
    rows, live_rows, tokens, heads = _tile_heads(program, num_tokens, N, ROWS)
    live = live_rows[:, None]
    x_at = _row_starts(tokens, heads, strides)
    y_at = rows.to(tl.int64)[:, None] * D
    at_a, at_b, in_a, in_b, turns = _pair_columns(D, R, ROWS, PAIRS)
    a = _load(x, x_at + at_a, live & in_a, 0.0)
    b = _load(x, x_at + at_b, live & in_b, 0.0)
    cos_at, sin_at = _angle_starts(tokens, num_positions, angle_strides)
    cos_a = _load(cos, cos_at + at_a, live & turns, 1.0)
    cos_b = _load(cos, cos_at + at_b, live & turns, 1.0)
    sin_a = _load(sin, sin_at + at_a, live & turns, 0.0)
    sin_b = _load(sin, sin_at + at_b, live & turns, 0.0)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + EPS)[:, None]
    weight_a, weight_b = rstd, rstd
    if SCALE > 0:
        weight_a, weight_b = _load(weight, at_a, in_a, 0.0), _load(weight, at_b, in_b, 0.0)
    # each rounding of the stock modules, in their order
    a = _scale_and_round(a * rstd, weight_a, SCALE, NORMED, SCALED)
    b = _scale_and_round(b * rstd, weight_b, SCALE, NORMED, SCALED)
    tl.store(y + y_at + at_a, _rounded(a * cos_a, OUT) - _rounded(b * sin_a, OUT), mask=live & in_a)
    tl.store(y + y_at + at_b, _rounded(b * cos_b, OUT) + _rounded(a * sin_b, OUT), mask=live & in_b)


@jit
def forward_kernel(
    q: tl.tuple,
    k: tl.tuple,
    angles: tl.tuple,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    angle_strides: tl.tuple,
    num_tokens: tl.tensor,
    num_positions: tl.tensor,
    q_programs: tl.tensor,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    # q, q_out, q_weight and likewise for k; cos and sin
    program = tl.program_id(0)
    if program < q_programs:
        _forward_tile(
            q, q_strides, angles, angle_strides, num_tokens, num_positions, program,
            Q_HEADS, D, R, EPS, SCALE, SCALED, ROWS, PAIRS,
        )  # fmt: skip
    else:
        _forward_tile(
            k, k_strides, angles, angle_strides, num_tokens, num_positions, program - q_programs,
            K_HEADS, D, R, EPS, SCALE, SCALED, ROWS, PAIRS,
        )  # fmt: skip


@jit
def _backward_tiles(
    tensors: tl.tuple,
    strides: tl.tuple,
    angles: tl.tuple,
    angle_strides: tl.tuple,
    sums: tl.tensor,
    num_tokens: tl.tensor,
    num_positions: tl.tensor,
    program: tl.tensor,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    dy, x, dx, weight = tensors
    cos, sin = angles
    at_a, at_b, in_a, in_b, turns = _pair_columns(D, R, ROWS, PAIRS)
    if SCALE > 0:
        # SCALE is 1 for w and 2 for 1 + w
        scale_a = _load(weight, at_a, in_a, 0.0) + (SCALE - 1)
        scale_b = _load(weight, at_b, in_b, 0.0) + (SCALE - 1)
    if WEIGHT_GRAD:
        sum_a, sum_b = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    for tile in range(TILES):
        rows, live_rows, tokens, heads = _tile_heads(program * TILES + tile, num_tokens, N, ROWS)
        live = live_rows[:, None]
        x_at = _row_starts(tokens, heads, strides[2:])
        dy_at = _row_starts(tokens, heads, strides[:2])
        dx_at = rows.to(tl.int64)[:, None] * D
        a = _load(x, x_at + at_a, live & in_a, 0.0)
        b = _load(x, x_at + at_b, live & in_b, 0.0)
        dy_a = _load(dy, dy_at + at_a, live & in_a, 0.0)
        dy_b = _load(dy, dy_at + at_b, live & in_b, 0.0)
        cos_at, sin_at = _angle_starts(tokens, num_positions, angle_strides)
        # y_a = a cos_a - b sin_a, y_b = b cos_b + a sin_b
        turned_a = dy_a * _load(cos, cos_at + at_a, live & turns, 1.0)
        turned_a += dy_b * _load(sin, sin_at + at_b, live & turns, 0.0)
        turned_b = dy_b * _load(cos, cos_at + at_b, live & turns, 1.0)
        turned_b -= dy_a * _load(sin, sin_at + at_a, live & turns, 0.0)
        scaled_a, scaled_b = turned_a, turned_b
        if SCALE > 0:
            scaled_a, scaled_b = turned_a * scale_a, turned_b * scale_b
        # a row past the end has rstd 0, so that it adds nothing to the weight's gradient whatever eps is
        rstd = tl.where(live_rows, tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + EPS), 0.0)
        # dx = rstd (g - x (g . x) rstd^2 / D) with g = w * turned
        pull = (tl.sum(scaled_a * a + scaled_b * b, axis=1) * rstd * rstd / D)[:, None]
        rstd = rstd[:, None]
        tl.store(dx + dx_at + at_a, (scaled_a - a * pull) * rstd, mask=live & in_a)
        tl.store(dx + dx_at + at_b, (scaled_b - b * pull) * rstd, mask=live & in_b)
        if WEIGHT_GRAD:
            sum_a += turned_a * a * rstd
            sum_b += turned_b * b * rstd
    if WEIGHT_GRAD:
        at_a, at_b, in_a, in_b, _ = _pair_columns(D, R, 1, PAIRS)
        tl.store(sums + at_a, tl.sum(sum_a, axis=0)[None, :], mask=in_a)
        tl.store(sums + at_b, tl.sum(sum_b, axis=0)[None, :], mask=in_b)


@jit
def backward_kernel(
    q: tl.tuple,
    k: tl.tuple,
    angles: tl.tuple,
    sums: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    angle_strides: tl.tuple,
    num_tokens: tl.tensor,
    num_positions: tl.tensor,
    q_programs: tl.tensor,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    # q_grad, q, dq, q_weight and likewise for k, with the strides of the first two; cos and sin
    program = tl.program_id(0)
    sums += program.to(tl.int64) * D
    if program < q_programs:
        _backward_tiles(
            q, q_strides, angles, angle_strides, sums, num_tokens, num_positions, program,
            Q_HEADS, D, R, EPS, SCALE, WEIGHT_GRAD, TILES, ROWS, PAIRS,
        )  # fmt: skip
    else:
        _backward_tiles(
            k, k_strides, angles, angle_strides, sums, num_tokens, num_positions, program - q_programs,
            K_HEADS, D, R, EPS, SCALE, WEIGHT_GRAD, TILES, ROWS, PAIRS,
        )  # fmt: skip
