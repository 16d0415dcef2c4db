"""A gated activation of base products and their adapters' sums, and its gradient, one Triton kernel each.

A program keeps its columns of both B and goes over rows: of every tile of G and U it computes the adapters' part by a
small product that stays in registers. Forward reads 2 MN and writes MN, backward reads 3 MN and writes 2 MN, besides
the narrow operands. Imported only where it runs.
"""

# M tokens, N outputs of gate and of up, W columns of one layer's u and B

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._jit import jit

__all__ = ["BACKWARD", "FORWARD", "Tile", "backward", "forward"]


class Tile(NamedTuple):
    """What a program computes at a time, and with what."""

    rows: int
    cols: int  # the program's share of both B
    warps: int
    stages: int  # tiles whose loads are in flight
    steps: int  # tiles of rows that a program goes over


#: The fastest of ``benchmarks.tune_gated`` on an H200 at 6144 and 12288 columns, 16384 tokens and 16 columns of B, both
#: ways: 92% and 90% of the rate of a copy.
FORWARD: Final = Tile(64, 64, 4, 3, 8)
BACKWARD: Final = Tile(64, 64, 4, 3, 8)


def forward(inputs: Sequence[Tensor], h: Tensor, *, gelu: bool, tile: Tile | None = None) -> None:
    """Writes ``act(G + u_g B_g^T) * (U + u_u B_u^T)``.

    Args:
        inputs: G and U ``[M, N]``, ``u_g`` and ``u_u`` side by side ``[M, W_g + W_u]``, ``B_g [N, W_g]`` and
            ``B_u [N, W_u]``, in bf16 or fp16, as is h; rows of all of them are dense.
        h: ``[M, N]``.
        gelu: GELU by tanh in place of SiLU.
        tile: other sizes than the default.
    """
    _launch(_forward_kernel, (*inputs, h), inputs, tile or FORWARD, gelu=gelu)


def backward(
    grad: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor], *, gelu: bool, tile: Tile | None = None
) -> None:
    """Writes ``grads``, those of both sums ``[M, N]``, from ``grad [M, N]``, that of h; all else as in ``forward``."""
    _launch(_backward_kernel, (grad, *inputs, *grads), inputs, tile or BACKWARD, gelu=gelu)


def _launch(kernel: Any, tensors: Sequence[Tensor], inputs: Sequence[Tensor], tile: Tile, *, gelu: bool) -> None:
    (tokens, outer), widths = inputs[0].shape, [b.shape[1] for b in inputs[3:]]
    steps = min(tile.steps, triton.cdiv(tokens, tile.rows))
    # columns first, so that programs at work at once read the same rows of u
    kernel[(triton.cdiv(outer, tile.cols), triton.cdiv(tokens, tile.rows * steps))](
        *tensors,
        *(x.stride(0) for x in tensors),
        *(tokens, outer, steps),
        *(*widths, *map(_block, widths)),
        *(gelu, tile.rows, tile.cols, tile.stages),
        num_warps=tile.warps,
    )


def _block(width: int) -> int:
    """What a product takes: a power of two, 16 at least."""
    power: int = triton.next_power_of_2(width)
    return max(16, power)


@jit
def _columns(
    b: tl.tensor, stride: tl.tensor, cols: tl.tensor, N: tl.tensor, W: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """``B^T [BLOCK, COLS]``, zero behind W."""
    wide = tl.arange(0, BLOCK)
    mask = (wide < W)[:, None] & (cols < N)[None, :]
    return tl.load(b + wide[:, None] + cols[None, :] * stride, mask=mask, other=0.0)


@jit
def _sums(
    base: tl.tensor,
    base_stride: tl.tensor,
    low: tl.tensor,
    low_stride: tl.tensor,
    weight: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """``base + u B^T`` in fp32."""
    here, wide = (rows < M)[:, None], tl.arange(0, BLOCK)[None, :]
    start = tl.load(base + rows[:, None] * base_stride + cols[None, :], mask=here & (cols < N)[None, :], other=0.0)
    u = tl.load(low + rows[:, None] * low_stride + wide, mask=here & (wide < W), other=0.0)
    return tl.dot(u, weight, start.to(tl.float32))


@jit
def _share(x: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """``s`` of ``act(x) = x s(x)``: both are a sigmoid, of x or of ``sqrt(8 / pi) (x + 0.044715 x^3)``."""
    if GELU:
        x = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@jit
def _slope(x: tl.tensor, share: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """``act'(x) = s + x s (1 - s) q'(x)`` for ``s = sigmoid(q(x))``."""
    inner = x * share * (1.0 - share)
    if GELU:
        inner = inner * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return share + inner


@jit
def _forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    narrow: tl.tensor,
    gate_b: tl.tensor,
    up_b: tl.tensor,
    h: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    narrow_stride: tl.tensor,
    gate_b_stride: tl.tensor,
    up_b_stride: tl.tensor,
    h_stride: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    steps: tl.tensor,
    GATE_WIDTH: tl.constexpr,
    UP_WIDTH: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    turn, turns = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    of_gate = _columns(gate_b, gate_b_stride, cols, N, GATE_WIDTH, GATE_BLOCK)
    of_up = _columns(up_b, up_b_stride, cols, N, UP_WIDTH, UP_BLOCK)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (turn + step * turns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        x = _sums(gate, gate_stride, narrow, narrow_stride, of_gate, rows, cols, M, N, GATE_WIDTH, GATE_BLOCK)
        y = _sums(up, up_stride, narrow + GATE_WIDTH, narrow_stride, of_up, rows, cols, M, N, UP_WIDTH, UP_BLOCK)
        place = h + rows[:, None] * h_stride + cols[None, :]
        value = x * _share(x, GELU) * y
        tl.store(place, value.to(h.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@jit
def _backward_kernel(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    narrow: tl.tensor,
    gate_b: tl.tensor,
    up_b: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    narrow_stride: tl.tensor,
    gate_b_stride: tl.tensor,
    up_b_stride: tl.tensor,
    dgate_stride: tl.tensor,
    dup_stride: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    steps: tl.tensor,
    GATE_WIDTH: tl.constexpr,
    UP_WIDTH: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    turn, turns = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    of_gate = _columns(gate_b, gate_b_stride, cols, N, GATE_WIDTH, GATE_BLOCK)
    of_up = _columns(up_b, up_b_stride, cols, N, UP_WIDTH, UP_BLOCK)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (turn + step * turns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = _sums(gate, gate_stride, narrow, narrow_stride, of_gate, rows, cols, M, N, GATE_WIDTH, GATE_BLOCK)
        y = _sums(up, up_stride, narrow + GATE_WIDTH, narrow_stride, of_up, rows, cols, M, N, UP_WIDTH, UP_BLOCK)
        d = tl.load(grad + rows[:, None] * grad_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        share = _share(x, GELU)
        # h = act(x) y
        to_gate, to_up = d * y * _slope(x, share, GELU), d * x * share
        tl.store(dgate + rows[:, None] * dgate_stride + cols[None, :], to_gate.to(dgate.dtype.element_ty), mask=mask)
        tl.store(dup + rows[:, None] * dup_stride + cols[None, :], to_up.to(dup.dtype.element_ty), mask=mask)
