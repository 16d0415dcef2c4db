"""The convolution and its gradient as Triton kernels that slide over the tokens. Imported only where they run.

A program owns a strip of channels over ``rows`` tokens and walks down it, keeping what the window needs in registers:
x is read once, but for the ``W - 1`` tokens before a strip. Each group of ``unroll`` tokens is loaded before it is
computed, so that several loads are in flight. Every output has blocks of channels of its own; where it is normalised,
a block is a head.

Forward reads ND and writes ND. Backward computes the activation again, reads 2ND (x, dy) and writes ND; the dx of a
token is complete ``W - 1`` tokens later, so ``W - 1`` sums wait in registers too.
"""

# N tokens of the stream, D channels, W width; offset: of a token inside its document

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._gated_delta_rule.reference import L2_EPS

__all__ = ["backward", "forward"]


class _Tile(NamedTuple):
    rows: int  # tokens of a program
    unroll: int  # tokens loaded together
    registers: int | None = None  # of a thread at most: more programs at a time


# Timed at [16384, 6144] bf16, W = 4, in three parts, on an H200 that copied at 4.1 TB/s. One warp on 128 channels, four
# a thread: no form with more warps or wider loads was faster. Forward 110 us, 89% of that copy; with heads 121, and 136
# without the limit on registers. Backward 162 us, 91%, and with heads 194; 13% and 8% slower with every window tested.
_BLOCK = 128
_FORWARD = _Tile(rows=64, unroll=8)
_FORWARD_HEADS = _Tile(rows=64, unroll=8, registers=64)
_BACKWARD = _Tile(rows=64, unroll=4)
_BACKWARD_HEADS = _Tile(rows=128, unroll=4, registers=112)
# Longer: a program writes its sums once. The limit costs 16 bytes of spills at most, and none would cost a third of the
# programs at a time.
_WEIGHT_GRAD = _Tile(rows=128, unroll=4, registers=168)
_LIMITED_WIDTH = 4  # the limits are for windows up to this, in 16 bits, on blocks of 128


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
) -> list[Tensor]:
    """The parts of the output, each contiguous ``[B, T, split[i]]``; see ``deltatune.ops.causal_conv``."""
    stream, parts = _stream(x), _Parts.of(tuple(split), tuple(l2norm))
    outs = [x.new_empty(*x.shape[:-1], size) for size in split]
    parts.launch(
        _forward,
        _FORWARD_HEADS if any(l2norm) else _FORWARD,
        *(stream, weight.contiguous(), bias, positions, tuple(outs)),
        width=weight.shape[1],
        options=(silu,),
    )
    return outs


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
    *,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx`` contiguous and, where wanted, ``dweight`` and ``dbias``, from the gradients of the parts."""
    stream, parts, width = _stream(x), _Parts.of(tuple(split), tuple(l2norm)), weight.shape[1]
    planes = width * weight_grad + bias_grad
    tile = _WEIGHT_GRAD if planes else _BACKWARD_HEADS if any(l2norm) else _BACKWARD
    # a gradient that is missing is one row of zeros, read again for every token
    given = [
        x.new_zeros(size).expand(len(stream), size) if grad is None else _stream(grad.to(x.dtype))
        for grad, size in zip(grads, split, strict=True)
    ]
    dx = x.new_empty(x.shape)
    sums = x.new_empty(-(-len(stream) // tile.rows), planes, x.shape[-1], dtype=torch.float32) if planes else None
    parts.launch(
        _backward,
        tile,
        *(stream, weight.contiguous(), bias, positions, tuple(given), tuple(y.stride(0) for y in given), dx, sums),
        width=width,
        options=(silu, weight_grad, bias_grad),
    )
    if sums is None:
        return dx, None, None
    totals = sums.sum(0)  # in a fixed order, as each program added its own: the same bits every time
    return (
        dx,
        totals[:width].T.to(weight.dtype).contiguous() if weight_grad else None,
        totals[-1].to(bias.dtype, copy=True) if bias is not None and bias_grad else None,
    )


class _Parts(NamedTuple):
    """Where each output begins in the channels of x, its width, its first block, and whether heads are normalised."""

    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    firsts: tuple[int, ...]
    norms: tuple[bool, ...] | None
    num_blocks: int
    block: int

    @staticmethod
    @functools.cache
    def of(split: tuple[int, ...], l2norm: tuple[int, ...]) -> _Parts:
        block = max(l2norm) or _BLOCK
        firsts = list(itertools.accumulate((-(-size // block) for size in split), initial=0))
        begins = tuple(itertools.accumulate(split[:-1], initial=0))
        norms = tuple(head > 0 for head in l2norm) if any(l2norm) else None
        return _Parts(begins, split, tuple(firsts[:-1]), norms, firsts[-1], block)

    def launch(
        self, kernel: Any, tile: _Tile, stream: Tensor, *args: object, width: int, options: tuple[bool, ...]
    ) -> None:
        """Runs ``kernel`` on every block of channels and every ``tile.rows`` tokens."""
        programs = -(-len(stream) // tile.rows)
        if not programs or not self.num_blocks:
            return
        usual = self.block == _BLOCK and stream.element_size() == 2 and width <= _LIMITED_WIDTH
        limit = {"maxnreg": tile.registers} if usual and tile.registers is not None else {}
        with torch.cuda.device(stream.get_device()):
            kernel[(self.num_blocks, programs)](
                *(stream, stream.stride(0), len(stream), *args, *self[:4]),
                *(width, 1 << (width - 1).bit_length(), *options),
                *(tile.rows, tile.unroll, self.block),
                num_warps=max(1, self.block // 256),
                **limit,
            )


def _stream(x: Tensor) -> Tensor:
    """``[B, T, D]`` to ``[N, D]`` with channels side by side: a view wherever the rows are evenly spaced."""
    stream = x.flatten(0, 1)
    return stream if stream.stride(-1) == 1 else stream.contiguous()


def _jit(function: Callable[..., Any]) -> Any:
    return triton.jit(function)


_EPS = tl.constexpr(L2_EPS)


@_jit
def _of_block(block: tl.tensor, values: tl.tuple, firsts: tl.tuple) -> tl.tensor:
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(block >= firsts[i], values[i], value)
    return value


@_jit
def _sigmoid(x: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    grown = 1.0 + tl.exp2(x * -1.4426950408889634)
    if EXACT:
        y = 1.0 / grown
    else:
        root = tl.rsqrt(grown)  # two instructions where the division takes five, right to 2^-21
        y = root * root
    return y


@_jit
def _load_taps(
    weight: tl.tensor, bias: tl.tensor, channels: tl.tensor, inside: tl.tensor, W: tl.constexpr, TAPS: tl.constexpr
) -> tl.tuple:
    # of the token itself, of the one before it, ...; then the bias, where there is one
    tap = tl.arange(0, TAPS)
    at = weight + channels[:, None] * W + tap[None, :]
    table = tl.load(at, mask=inside[:, None] & (tap < W)[None, :], other=0.0).to(tl.float32)
    taps = tl.tuple(())
    for j in tl.static_range(W):
        taps += (tl.sum(tl.where((tap == W - 1 - j)[None, :], table, 0.0), axis=1),)
    if bias is not None:
        taps += (tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32),)
    return taps


@_jit
def _load_history(
    at: tl.tensor, stride: tl.tensor, offset: tl.tensor, cols: tl.tensor, size: tl.tensor, W: tl.constexpr
) -> tl.tuple:
    # x_{t-1}, x_{t-2}, ... of the first token t; 0 before its document
    history = tl.tuple(())
    for j in tl.static_range(1, W):
        inside = cols < tl.where(offset >= j, size, 0)
        history += (tl.load(at - j * stride, mask=inside, other=0.0).to(tl.float32),)
    return history


@_jit
def _load_rows(
    at: tl.tensor,
    stride: tl.tensor,
    cols: tl.tensor,
    size: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    UNROLL: tl.constexpr,
) -> tl.tuple:
    rows = tl.tuple(())
    for u in tl.static_range(UNROLL):
        rows += (tl.load(at + u * stride, mask=cols < tl.where(row + u < end, size, 0), other=0.0),)
    return rows


@_jit
def _load_offsets(positions: tl.tensor, row: tl.tensor, end: tl.tensor, UNROLL: tl.constexpr) -> tl.tuple:
    offsets = tl.tuple(())
    for u in tl.static_range(UNROLL):
        offsets += (tl.load(positions + row + u, mask=row + u < end, other=0),)
    return offsets


@_jit
def _window(row: tl.tensor, history: tl.tuple, offset: tl.tensor, RESET: tl.constexpr) -> tl.tuple:
    # x_t, x_{t-1}, ...: where t begins a document, what was before it is dropped for good
    seen = tl.tuple((row.to(tl.float32),))
    for j in tl.static_range(len(history)):
        if RESET:
            seen += (tl.where(offset == 0, 0.0, history[j]),)
        else:
            seen += (history[j],)
    return seen


@_jit
def _weighted(seen: tl.tuple, taps: tl.tuple) -> tl.tensor:
    total = seen[0] * taps[0]
    for j in tl.static_range(1, len(seen)):
        total += seen[j] * taps[j]
    if len(taps) > len(seen):
        total += taps[len(seen)]
    return total


@_jit
def _forward(
    x: tl.tensor,
    stride: tl.tensor,
    num_tokens: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    positions: tl.tensor,
    outs: tl.tuple,
    begins: tl.tuple,
    sizes: tl.tuple,
    firsts: tl.tuple,
    norms: tl.tuple,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block, start = tl.program_id(0), tl.program_id(1) * ROWS
    size = _of_block(block, sizes, firsts)
    out = _of_block(block, outs, firsts)
    cols = (block - _of_block(block, firsts, firsts)) * BLOCK + tl.arange(0, BLOCK)
    channels = _of_block(block, begins, firsts) + cols
    at = x + start.to(tl.int64) * stride + channels
    out_at = out + start.to(tl.int64) * size + cols
    taps = _load_taps(weight, bias, channels, cols < size, W, TAPS)
    history = _load_history(at, stride, tl.load(positions + start), cols, size, W)
    for row in range(start, start + ROWS, UNROLL):
        rows = _load_rows(at, stride, cols, size, row, num_tokens, UNROLL)
        offsets = _load_offsets(positions, row, num_tokens, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = _window(rows[u], history, offsets[u], True)
            history = seen[: W - 1]
            y = _weighted(seen, taps)
            if SILU:
                y *= _sigmoid(y, rows[u].dtype == tl.float32)
            if norms is not None:
                y *= tl.where(_of_block(block, norms, firsts), tl.rsqrt(tl.sum(y * y) + _EPS), 1.0)
            inside = cols < tl.where(row + u < num_tokens, size, 0)
            tl.store(out_at + u * size, y.to(out.dtype.element_ty), mask=inside)
        at += UNROLL * stride
        out_at += UNROLL * size


@_jit
def _accumulate(sums: tl.tuple, values: tl.tuple) -> tl.tuple:
    total = tl.tuple(())
    for j in tl.static_range(len(sums)):
        total += (sums[j] + values[j],)
    return total


@_jit
def _backward_rows(
    state: tl.tuple,
    loaded: tl.tuple,
    taps: tl.tuple,
    norm: tl.tensor,
    place: tl.tuple,
    SILU: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    RESET: tl.constexpr,
) -> tl.tuple:
    history, waiting, sums = state
    rows, grads, offsets = loaded
    at, stride, cols, size, row, start, end = place
    group = tl.tuple(())
    for u in tl.static_range(len(rows)):
        seen = _window(rows[u], history, offsets[u], RESET)
        history = seen[: len(history)]
        y = _weighted(seen, taps)
        grad = grads[u].to(tl.float32)
        if SILU:
            gate = _sigmoid(y, rows[u].dtype == tl.float32)
            y *= gate
        if norm is not None:
            # of y r, r = rsqrt(sum(y^2) + eps): dy = r d(yr) - y r^3 (y . d(yr))
            inverse = tl.rsqrt(tl.sum(y * y) + _EPS)
            along = tl.sum(y * grad) * inverse * inverse * inverse
            grad = tl.where(norm, grad * inverse - y * along, grad)
        if SILU:
            grad *= gate + y - y * gate  # d silu(s) = gate + s gate (1 - gate)
        own = tl.where(row + u < end, grad, 0.0)
        products = tl.tuple(())
        if WEIGHT_GRAD:
            for j in tl.static_range(len(seen)):
                products += (own * seen[j],)
        if BIAS_GRAD:
            products += (own,)
        # the few of a group first: long sums of small terms would lose bits in fp32
        group = products if u == 0 else _accumulate(group, products)
        # dx_{t-j} += w_j ds_t, where t - j is in the document of t
        moved = tl.tuple((grad * taps[0],))
        for j in tl.static_range(1, len(seen)):
            reaching = grad
            if RESET:
                reaching = tl.where(offsets[u] >= j, grad, 0.0)
            moved += (waiting[j - 1] + reaching * taps[j],)
        waiting = moved[: len(waiting)]
        complete = row + u - len(waiting)
        inside = cols < tl.where((complete >= start) & (complete < end), size, 0)
        tl.store(at + u * stride, moved[len(waiting)].to(at.dtype.element_ty), mask=inside)
    return history, waiting, _accumulate(sums, group)


@_jit
def _backward(
    x: tl.tensor,
    stride: tl.tensor,
    num_tokens: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    positions: tl.tensor,
    grads: tl.tuple,
    grad_strides: tl.tuple,
    dx: tl.tensor,
    partial: tl.tensor,
    begins: tl.tuple,
    sizes: tl.tuple,
    firsts: tl.tuple,
    norms: tl.tuple,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block, start = tl.program_id(0), tl.program_id(1) * ROWS
    size = _of_block(block, sizes, firsts)
    grad_stride = _of_block(block, grad_strides, firsts)
    norm = None if norms is None else _of_block(block, norms, firsts)
    D = begins[len(begins) - 1] + sizes[len(sizes) - 1]
    cols = (block - _of_block(block, firsts, firsts)) * BLOCK + tl.arange(0, BLOCK)
    channels = _of_block(block, begins, firsts) + cols
    at = x + start.to(tl.int64) * stride + channels
    grad_at = _of_block(block, grads, firsts) + start.to(tl.int64) * grad_stride + cols
    dx_at = dx + (start.to(tl.int64) - (W - 1)) * D + channels
    end = tl.minimum(num_tokens, start + ROWS)
    last = tl.minimum(num_tokens, start + ROWS + W - 1)  # dx at the end needs the tokens after it
    taps = _load_taps(weight, bias, channels, cols < size, W, TAPS)
    waiting, sums = tl.tuple(()), tl.tuple(())
    for _ in tl.static_range(1, W):
        waiting += (tl.zeros((BLOCK,), tl.float32),)
    for _ in tl.static_range(W * WEIGHT_GRAD + BIAS_GRAD):
        sums += (tl.zeros((BLOCK,), tl.float32),)
    state = (_load_history(at, stride, tl.load(positions + start), cols, size, W), waiting, sums)
    rows = _load_rows(at, stride, cols, size, start, last, UNROLL)
    grad_rows = _load_rows(grad_at, grad_stride, cols, size, start, last, UNROLL)
    for row in range(start, start + ROWS + W - 1, UNROLL):
        # the next group is on its way while this one is computed
        offsets = _load_offsets(positions, row, last, UNROLL)
        loaded = (rows, grad_rows, offsets)
        at += UNROLL * stride
        grad_at += UNROLL * grad_stride
        rows = _load_rows(at, stride, cols, size, row + UNROLL, last, UNROLL)
        grad_rows = _load_rows(grad_at, grad_stride, cols, size, row + UNROLL, last, UNROLL)
        least = offsets[0]
        for u in tl.static_range(1, UNROLL):
            least = tl.minimum(least, offsets[u])
        place = (dx_at, D, cols, size, row, start, end)
        # most groups are deep inside a document: no window there is cut
        if least >= W - 1:
            state = _backward_rows(state, loaded, taps, norm, place, SILU, WEIGHT_GRAD, BIAS_GRAD, False)
        else:
            state = _backward_rows(state, loaded, taps, norm, place, SILU, WEIGHT_GRAD, BIAS_GRAD, True)
        dx_at += UNROLL * D
    sums = state[2]
    if partial is not None:
        planes = partial + tl.program_id(1).to(tl.int64) * len(sums) * D + channels
        for j in tl.static_range(len(sums)):
            plane = W - 1 - j if WEIGHT_GRAD and j < W else j
            tl.store(planes + plane * D, sums[j], mask=cols < size)
