"""``y = rope(x * rsqrt(mean(x^2) + eps) * w)`` and its gradient, one Triton kernel each.

A program takes a few heads of q or a few of k, so both share one launch. A head is held as pairs ``(a, b)``: first the
R/2 that rotate, then the dims that pass, paired anyhow and turned by nothing; so no element is read twice. Forward
reads SND and writes SND for each tensor, backward reads 2 SND and writes SND. Any strides of tokens and heads: views
of one projection need no copy. Imported only where it runs.
"""

# S tokens of all rows, P positions of cos and sin (S, or T where one row serves all), N heads, D head dim, R rotary dim

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._rms_norm_rope.reference import result_dtype, scaled_dtype

__all__ = ["backward", "forward"]

# Numbers a program holds of each tensor, and warps. H200, bf16, 16384 tokens, 40/8 heads of 128 and 16/4 of 256: from
# 1024 to 4096 with 4 warps within 4% of each other both ways, 8192 with 8 warps 11% to 14% slower forward.
_ELEMENTS, _WARPS = 2048, 4
# With a weight's gradient, whose sums take registers too; and the tiles one program sums. There: 1.07x and 1.06x as
# fast as 2048 numbers and 16 tiles, 1.04x and 1.09x as fast as 8 tiles.
_SUMMED_ELEMENTS, _TILES = 1024, 16

_NO_SCALE, _WEIGHT, _ONE_PLUS_WEIGHT = 0, 1, 2
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor | None]:
    """q ``[S, N, D]`` and k ``[S, M, D]`` normalised and rotated, contiguous; cos and sin ``[P, R]``."""
    heads = [(_unit_stride(q), q_weight)]
    if k is not None:
        heads.append((_unit_stride(k), k_weight))
    outs = [x.new_empty(x.shape, dtype=result_dtype(x, w, cos, unit_offset)) for x, w in heads]
    rows = _rows(q.shape[-1])
    programs = [triton.cdiv(x.shape[0] * x.shape[1], rows) for x, _ in heads]
    if sum(programs):
        # alone, q stands in for k too, which then has no programs
        (x, w), (x2, w2) = heads[0], heads[-1]
        cos, sin = _unit_stride(cos), _unit_stride(sin)
        _forward_kernel[(sum(programs),)](
            *(x, outs[0], w, x2, outs[-1], w2, cos, sin),
            *(*x.stride()[:2], *x2.stride()[:2], cos.stride(0), sin.stride(0)),
            *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
            *(_scale(w, unit_offset), _DTYPES[scaled_dtype(x, w, unit_offset)], rows, _pairs(x.shape[2])),
            num_warps=_WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would skip a rounding of the stock modules
        )
    return outs[0], None if k is None else outs[1]


def backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q and k, contiguous, and with ``weight_grad`` those of their weights.

    A weight's is summed in fp32 in a fixed order: each program over its rows, then over the programs.
    """
    heads = [(_unit_stride(q_grad), _unit_stride(q), q_weight)]
    if k is not None:
        assert k_grad is not None
        heads.append((_unit_stride(k_grad), _unit_stride(k), k_weight))
    grads = [x.new_empty(x.shape) for _, x, _ in heads]
    rows, tiles = (_rows(q.shape[-1], _SUMMED_ELEMENTS), _TILES) if weight_grad else (_rows(q.shape[-1]), 1)
    programs = [triton.cdiv(x.shape[0] * x.shape[1], rows * tiles) for _, x, _ in heads]
    sums = q.new_empty(sum(programs) if weight_grad else 0, q.shape[-1], dtype=torch.float32)
    if sum(programs):
        (dy, x, w), (dy2, x2, w2) = heads[0], heads[-1]
        cos, sin = _unit_stride(cos), _unit_stride(sin)
        _backward_kernel[(sum(programs),)](
            *(dy, x, grads[0], w, dy2, x2, grads[-1], w2, cos, sin, sums),
            *(*dy.stride()[:2], *x.stride()[:2], *dy2.stride()[:2], *x2.stride()[:2], cos.stride(0), sin.stride(0)),
            *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
            *(_scale(w, unit_offset), weight_grad, tiles, rows, _pairs(x.shape[2])),
            num_warps=_WARPS,
        )
    weight_grads: list[Tensor | None] = [None, None]
    if weight_grad:
        parts = zip(sums.split_with_sizes(programs), heads, strict=True)
        weight_grads = [None if w is None else part.sum(0).to(w.dtype) for part, (_, _, w) in parts] + [None]
    return grads[0], None if k is None else grads[1], weight_grads[0], weight_grads[1]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(dim: int, elements: int = _ELEMENTS) -> int:
    rows: int = max(1, elements // triton.next_power_of_2(dim))
    return rows


def _pairs(dim: int) -> int:
    pairs: int = triton.next_power_of_2((dim + 1) // 2)
    return pairs


def _scale(weight: Tensor | None, unit_offset: bool) -> int:
    return _NO_SCALE if weight is None else _ONE_PLUS_WEIGHT if unit_offset else _WEIGHT


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
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    # a and b of each pair, and which rotate: (0, R/2), (1, R/2 + 1), ...; then what passes, (R, R + (D-R)/2), ...
    # Of every row, so that the weight is loaded in the layout of x: another layout costs shared memory and barriers.
    pair = tl.broadcast_to(tl.arange(0, PAIRS)[None, :], [ROWS, PAIRS])
    turns = pair < R // 2
    a = tl.where(turns, pair, pair + R // 2)
    return a, tl.where(turns, pair + R // 2, pair + R // 2 + (D - R + 1) // 2), turns


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
    rows = program * ROWS + tl.arange(0, ROWS)
    live = (rows < num_tokens * N)[:, None]
    tokens = rows // N
    x_at = (tokens.to(tl.int64) * token_stride + rows % N * head_stride)[:, None]
    y_at = rows.to(tl.int64)[:, None] * D
    at_a, at_b, turns = _pair_columns(D, R, ROWS, PAIRS)
    in_a, in_b = at_a < R + (D - R + 1) // 2, at_b < D
    a = _load(x, x_at + at_a, live & in_a, 0.0)
    b = _load(x, x_at + at_b, live & in_b, 0.0)
    cos_at, sin_at = (tokens % num_positions * cos_stride)[:, None], (tokens % num_positions * sin_stride)[:, None]
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
    at_a, at_b, turns = _pair_columns(D, R, ROWS, PAIRS)
    in_a, in_b = at_a < R + (D - R + 1) // 2, at_b < D
    if SCALE > 0:
        # SCALE is 1 for w and 2 for 1 + w
        scale_a = _load(weight, at_a, in_a, 0.0) + (SCALE - 1)
        scale_b = _load(weight, at_b, in_b, 0.0) + (SCALE - 1)
    if WEIGHT_GRAD:
        sum_a, sum_b = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    for tile in range(TILES):
        rows = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        live_rows = rows < num_tokens * N
        live = live_rows[:, None]
        tokens, heads = rows // N, rows % N
        x_at = (tokens.to(tl.int64) * token_stride + heads * head_stride)[:, None]
        dy_at = (tokens.to(tl.int64) * dy_token_stride + heads * dy_head_stride)[:, None]
        dx_at = rows.to(tl.int64)[:, None] * D
        a = _load(x, x_at + at_a, live & in_a, 0.0)
        b = _load(x, x_at + at_b, live & in_b, 0.0)
        dy_a = _load(dy, dy_at + at_a, live & in_a, 0.0)
        dy_b = _load(dy, dy_at + at_b, live & in_b, 0.0)
        cos_at, sin_at = (tokens % num_positions * cos_stride)[:, None], (tokens % num_positions * sin_stride)[:, None]
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
        at_a, at_b, _ = _pair_columns(D, R, 1, PAIRS)
        tl.store(sums + at_a, tl.sum(sum_a, axis=0)[None, :], mask=at_a < R + (D - R + 1) // 2)
        tl.store(sums + at_b, tl.sum(sum_b, axis=0)[None, :], mask=at_b < D)


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
_scale_and_round = triton.jit(_scaled)
_forward_tile, _backward_tiles = triton.jit(_forward_rows), triton.jit(_backward_rows)
_forward_kernel, _backward_kernel = triton.jit(_forward), triton.jit(_backward)
