"""The convolution and its gradient as Triton kernels that slide over the tokens. Imported only where they run.

A program owns a strip of channels over ``ROWS`` tokens and walks down it, keeping what the window needs in registers:
x is read once, but for the ``W - 1`` tokens before a strip. Each group of ``UNROLL`` tokens is loaded before it is
computed, so that several loads are in flight. Every output has blocks of channels of its own; where it is normalised,
a block is a head.

The grid is one row, blocks of channels first: other axes of a grid end at 65535, which 4.2 million tokens would pass.

Forward reads ND and writes ND. Backward computes the activation again, reads 2ND (x, dy) and writes ND; the dx of a
token is complete ``W - 1`` tokens later, so ``W - 1`` sums wait in registers too.
"""

# N tokens of the stream, D channels, W width; offset: of a token inside its document

from __future__ import annotations

import triton.language as tl

from deltatune.ops._jit import jit
from deltatune.ops._numerics import L2_EPS

__all__ = ["backward_kernel", "forward_kernel"]


_EPS = tl.constexpr(L2_EPS)


@jit
def _of_block(block: tl.tensor, values: tl.tuple, firsts: tl.tuple) -> tl.tensor:
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(block >= firsts[i], values[i], value)
    return value


@jit
def _sigmoid(x: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    grown = 1.0 + tl.exp2(x * -1.4426950408889634)
    if EXACT:
        y = 1.0 / grown
    else:
        root = tl.rsqrt(grown)  # two instructions where the division takes five, right to 2^-21
        y = root * root
    return y


@jit
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


@jit
def _load_history(
    at: tl.tensor, stride: tl.tensor, offset: tl.tensor, cols: tl.tensor, size: tl.tensor, W: tl.constexpr
) -> tl.tuple:
    # x_{t-1}, x_{t-2}, ... of the first token t; 0 before its document
    history = tl.tuple(())
    for j in tl.static_range(1, W):
        inside = cols < tl.where(offset >= j, size, 0)
        history += (tl.load(at - j * stride, mask=inside, other=0.0).to(tl.float32),)
    return history


@jit
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


@jit
def _load_offsets(positions: tl.tensor, row: tl.tensor, end: tl.tensor, UNROLL: tl.constexpr) -> tl.tuple:
    offsets = tl.tuple(())
    for u in tl.static_range(UNROLL):
        offsets += (tl.load(positions + row + u, mask=row + u < end, other=0),)
    return offsets


@jit
def _window(row: tl.tensor, history: tl.tuple, offset: tl.tensor, RESET: tl.constexpr) -> tl.tuple:
    # x_t, x_{t-1}, ...: where t begins a document, what was before it is dropped for good
    seen = tl.tuple((row.to(tl.float32),))
    for j in tl.static_range(len(history)):
        if RESET:
            seen += (tl.where(offset == 0, 0.0, history[j]),)
        else:
            seen += (history[j],)
    return seen


@jit
def _weighted(seen: tl.tuple, taps: tl.tuple) -> tl.tensor:
    total = seen[0] * taps[0]
    for j in tl.static_range(1, len(seen)):
        total += seen[j] * taps[j]
    if len(taps) > len(seen):
        total += taps[len(seen)]
    return total


@jit
def forward_kernel(
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
    BLOCKS: tl.constexpr,
) -> None:
    strip = tl.program_id(0) // BLOCKS
    block, start = tl.program_id(0) % BLOCKS, strip * ROWS
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


@jit
def _accumulate(sums: tl.tuple, values: tl.tuple) -> tl.tuple:
    total = tl.tuple(())
    for j in tl.static_range(len(sums)):
        total += (sums[j] + values[j],)
    return total


@jit
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


@jit
def backward_kernel(
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
    BLOCKS: tl.constexpr,
) -> None:
    strip = tl.program_id(0) // BLOCKS
    block, start = tl.program_id(0) % BLOCKS, strip * ROWS
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
        # most groups are deep inside a document: no window there is cut, as none is of one token
        if W == 1 or least >= W - 1:
            state = _backward_rows(state, loaded, taps, norm, place, SILU, WEIGHT_GRAD, BIAS_GRAD, False)
        else:
            state = _backward_rows(state, loaded, taps, norm, place, SILU, WEIGHT_GRAD, BIAS_GRAD, True)
        dx_at += UNROLL * D
    sums = state[2]
    if partial is not None:
        planes = partial + strip.to(tl.int64) * len(sums) * D + channels
        for j in tl.static_range(len(sums)):
            plane = W - 1 - j if WEIGHT_GRAD and j < W else j
            tl.store(planes + plane * D, sums[j], mask=cols < size)
