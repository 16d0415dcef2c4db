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

__all__ = ["backward_kernel", "forward_kernel"]


def _load_wide(pointer: tl.tensor, at: tl.tensor, mask: tl.tensor, other: tl.constexpr) -> tl.tensor:
    return tl.load(pointer + at, mask=mask, other=other).to(tl.float32)


def _round(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    return x.to(DTYPE).to(tl.float32)


def _scaled(
    x: tl.tensor, weight: tl.tensor, SCALE: tl.constexpr, NORMED: tl.constexpr, SCALED: tl.constexpr
) -> tl.tensor:
    if SCALE == 2:
        return _rounded(x * (1.0 + weight), NORMED)
    y = _rounded(x, NORMED)
    if SCALE == 1:
        y = _rounded(y * weight, SCALED)
    return y


def _columns(
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    # a and b of each pair: (0, R/2), (1, R/2 + 1), ...; then what passes, (R, R + (D-R)/2), ...; which a and which b
    # there are, and which pairs rotate.
    # Of every row, so that the weight is loaded in the layout of x: another layout costs shared memory and barriers.
    pair = tl.broadcast_to(tl.arange(0, PAIRS)[None, :], [ROWS, PAIRS])
    turns = pair < R // 2
    a = tl.where(turns, pair, pair + R // 2)
    b = tl.where(turns, pair + R // 2, pair + R // 2 + (D - R + 1) // 2)
    return a, b, a < R + (D - R + 1) // 2, b < D, turns


def _heads_of_tile(
    tile: tl.tensor, num_tokens: tl.tensor, N: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    # the rows of a tile, which of them there are, and the token and the head that each is
    rows = tile * ROWS + tl.arange(0, ROWS)
    return rows, rows < num_tokens * N, rows // N, rows % N


def _starts_of_rows(tokens: tl.tensor, heads: tl.tensor, token_stride: tl.tensor, head_stride: tl.tensor) -> tl.tensor:
    # in 64 bits: heads may lie further apart than tokens, and both further than 2^31 elements
    return (tokens.to(tl.int64) * token_stride + heads.to(tl.int64) * head_stride)[:, None]


def _starts_of_angles(
    tokens: tl.tensor, num_positions: tl.tensor, cos_stride: tl.tensor, sin_stride: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    positions = (tokens % num_positions).to(tl.int64)
    return (positions * cos_stride)[:, None], (positions * sin_stride)[:, None]


def _forward_rows(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
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
    NORMED: tl.constexpr = x.dtype.element_ty
    OUT: tl.constexpr = y.dtype.element_ty
    rows, live_rows, tokens, heads = _tile_heads(program, num_tokens, N, ROWS)
    live = live_rows[:, None]
    x_at = _row_starts(tokens, heads, token_stride, head_stride)
    y_at = rows.to(tl.int64)[:, None] * D
    at_a, at_b, in_a, in_b, turns = _pair_columns(D, R, ROWS, PAIRS)
    a = _load(x, x_at + at_a, live & in_a, 0.0)
    b = _load(x, x_at + at_b, live & in_b, 0.0)
    cos_at, sin_at = _angle_starts(tokens, num_positions, cos_stride, sin_stride)
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


def _forward(
    q: tl.tensor,
    q_out: tl.tensor,
    q_weight: tl.tensor,
    k: tl.tensor,
    k_out: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
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
    program = tl.program_id(0)
    if program < q_programs:
        _forward_tile(
            q, q_out, q_weight, cos, sin, q_token_stride, q_head_stride, cos_stride, sin_stride,
            num_tokens, num_positions, program, Q_HEADS, D, R, EPS, SCALE, SCALED, ROWS, PAIRS,
        )  # fmt: skip
    else:
        _forward_tile(
            k, k_out, k_weight, cos, sin, k_token_stride, k_head_stride, cos_stride, sin_stride,
            num_tokens, num_positions, program - q_programs, K_HEADS, D, R, EPS, SCALE, SCALED, ROWS, PAIRS,
        )  # fmt: skip


def _backward_rows(
    dy: tl.tensor,
    x: tl.tensor,
    dx: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    sums: tl.tensor,
    dy_token_stride: tl.tensor,
    dy_head_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
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
        x_at = _row_starts(tokens, heads, token_stride, head_stride)
        dy_at = _row_starts(tokens, heads, dy_token_stride, dy_head_stride)
        dx_at = rows.to(tl.int64)[:, None] * D
        a = _load(x, x_at + at_a, live & in_a, 0.0)
        b = _load(x, x_at + at_b, live & in_b, 0.0)
        dy_a = _load(dy, dy_at + at_a, live & in_a, 0.0)
        dy_b = _load(dy, dy_at + at_b, live & in_b, 0.0)
        cos_at, sin_at = _angle_starts(tokens, num_positions, cos_stride, sin_stride)
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


def _backward(
    q_grad: tl.tensor,
    q: tl.tensor,
    dq: tl.tensor,
    q_weight: tl.tensor,
    k_grad: tl.tensor,
    k: tl.tensor,
    dk: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    sums: tl.tensor,
    q_grad_token_stride: tl.tensor,
    q_grad_head_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_grad_token_stride: tl.tensor,
    k_grad_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
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
    program = tl.program_id(0)
    sums += program.to(tl.int64) * D
    if program < q_programs:
        _backward_tiles(
            q_grad, q, dq, q_weight, cos, sin, sums, q_grad_token_stride, q_grad_head_stride,
            q_token_stride, q_head_stride, cos_stride, sin_stride, num_tokens, num_positions, program,
            Q_HEADS, D, R, EPS, SCALE, WEIGHT_GRAD, TILES, ROWS, PAIRS,
        )  # fmt: skip
    else:
        _backward_tiles(
            k_grad, k, dk, k_weight, cos, sin, sums, k_grad_token_stride, k_grad_head_stride,
            k_token_stride, k_head_stride, cos_stride, sin_stride, num_tokens, num_positions, program - q_programs,
            K_HEADS, D, R, EPS, SCALE, WEIGHT_GRAD, TILES, ROWS, PAIRS,
        )  # fmt: skip


_load, _rounded, _pair_columns = triton.jit(_load_wide), triton.jit(_round), triton.jit(_columns)
_tile_heads, _row_starts = triton.jit(_heads_of_tile), triton.jit(_starts_of_rows)
_angle_starts, _scale_and_round = triton.jit(_starts_of_angles), triton.jit(_scaled)
_forward_tile, _backward_tiles = triton.jit(_forward_rows), triton.jit(_backward_rows)
forward_kernel, backward_kernel = triton.jit(_forward), triton.jit(_backward)
