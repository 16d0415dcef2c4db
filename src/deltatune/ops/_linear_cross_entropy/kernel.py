"""Triton kernels of an online softmax whose logits exist in registers only: what a matrix product does with a tile.

``exp(logit - r_i)`` is stored in 16 bits, with a reference ``r_i`` for each token. It need not be the maximum: 16-bit
floats keep their relative precision over a range, so it starts as the label's own logit and rises only where a logit
exceeds it by ``HEADROOM``. Such rows are computed again, by a launch that otherwise ends at once: no decision of the
host, no synchronisation. Imported only where it runs.
"""

# C tokens of a chunk, E width of hidden, V vocabulary, N entries of a vocabulary block [start, stop)

from __future__ import annotations

import triton.language as tl

from deltatune.ops._jit import jit

__all__ = ["gradients_kernel", "hidden_gradient_kernel", "label_logits_kernel", "powers_kernel", "settle_kernel"]


@jit
def label_logits_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    labels: tl.tensor,
    reference: tl.tensor,
    weight_stride: tl.tensor,
    V: tl.tensor,
    ignore_index: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    entry = tl.where(known, label, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, E, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        left = tl.load(hidden + row * E + columns, mask=columns < E, other=0.0).to(tl.float32)
        right = tl.load(weight + entry * weight_stride + columns, mask=columns < E, other=0.0).to(tl.float32)
        total += left * right
    logit = tl.where(known, tl.sum(total, axis=0), float("nan"))
    tl.store(reference + row, tl.where(label == ignore_index, float("inf"), logit))


@jit
def _logits(
    hidden: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    entry: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros((ROWS, ENTRIES), tl.float32)
    for at in range(0, E, DEPTH):
        total = tl.dot(hidden.load([row, at]), weight.load([entry, at]).T, total)
    return total


@jit
def _store_powers(
    logits: tl.tensor,
    base: tl.tensor,
    stored: tl.tensor,
    labels: tl.tensor,
    sums: tl.tensor,
    C: tl.tensor,
    row: tl.tensor,
    entry: tl.tensor,
    start: tl.tensor,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """The rest of a tile: exponentials of ``logits - base``, their sums and their place in 16 bits."""
    rows = row + tl.arange(0, ROWS)
    inside = rows < C
    own = tl.load(labels + rows, mask=inside, other=-1) - (start + entry)
    # exp(x - r) = 2^(x log2 e - r log2 e): one multiply-add and one instruction
    values = tl.exp2(logits * 1.4426950408889634 - (base * 1.4426950408889634)[:, None])
    values = tl.where(own[:, None] == tl.arange(0, ENTRIES)[None, :], 0.0, values)
    tl.store(sums + entry // ENTRIES * C + rows, tl.sum(values, axis=1), mask=inside)
    if STORE:
        stored.store([row, entry], values.to(stored.dtype))


@jit
def powers_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    stored: tl.tensor,
    labels: tl.tensor,
    reference: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    C: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    E: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    # programs that run together share few entries' weights and all of the tokens
    row_tiles = tl.cdiv(C, ROWS)
    row, entry = tl.program_id(0) % row_tiles * ROWS, tl.program_id(0) // row_tiles * ENTRIES
    logits = _logits(hidden, weight, row, start + entry, E, ROWS, ENTRIES, DEPTH)
    if start + entry + ENTRIES > stop:
        logits = tl.where((start + entry + tl.arange(0, ENTRIES) < stop)[None, :], logits, float("-inf"))
    rows = row + tl.arange(0, ROWS)
    tl.atomic_max(maxima + rows, tl.max(logits, axis=1), mask=rows < C, sem="relaxed")
    base = tl.load(reference + rows, mask=rows < C, other=float("inf"))
    _store_powers(logits, base, stored, labels, sums, C, row, entry, start, STORE, ROWS, ENTRIES)


@jit
def _scale_rows(
    matrix: tl.tensor,
    rows: tl.tensor,
    factors: tl.tensor,
    C: tl.tensor,
    wanted: tl.tensor,
    E: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    if wanted:
        for begin in range(0, E, DEPTH):
            columns = begin + tl.arange(0, DEPTH)
            at = matrix + rows[:, None].to(tl.int64) * E + columns[None, :]
            mask = (rows < C)[:, None] & (columns < E)[None, :]
            tl.store(at, tl.load(at, mask=mask, other=0.0) * factors[:, None], mask=mask)


@jit
def settle_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    stored: tl.tensor,
    labels: tl.tensor,
    reference: tl.tensor,
    raised: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    sums_before: tl.tensor,
    totals: tl.tensor,
    products: tl.tensor,
    C: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    STORE: tl.constexpr,
    HEADROOM: tl.constexpr,
    TILES_AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    inside = rows < C
    base = tl.load(reference + rows, mask=inside, other=float("inf"))
    highest = tl.load(maxima + rows, mask=inside, other=float("-inf"))
    rises = highest > base + HEADROOM
    shrink = tl.where(rises, tl.exp(base - highest), 1.0)
    base = tl.where(rises, highest, base)
    first = tl.program_id(1)
    if first == 0:
        tl.store(raised + rows, base, mask=inside)
        total = tl.zeros([ROWS], tl.float32)
        if start > 0:
            total = tl.load(totals + rows, mask=inside, other=0.0)
            for begin in range(0, TILES, TILES_AT_ONCE):
                tiles = begin + tl.arange(0, TILES_AT_ONCE)
                at = sums_before + tiles[:, None] * C + rows[None, :]
                total += tl.sum(tl.load(at, mask=(tiles < TILES)[:, None] & inside[None, :], other=0.0), axis=0)
        tl.store(totals + rows, total * shrink, mask=inside)
    if tl.max(rises.to(tl.int32), axis=0) > 0:
        if STORE:
            _scale_rows(products, rows, shrink, C, (start > 0) & (first == 0), E, DEPTH)
        for turn in range(0, TILES, SPLITS):
            entry = (turn + first) * ENTRIES
            # past the block's end there is nothing to compute and no row of sums
            if start + entry < stop:
                logits = _logits(hidden, weight, row, start + entry, E, ROWS, ENTRIES, DEPTH)
                logits = tl.where((start + entry + tl.arange(0, ENTRIES) < stop)[None, :], logits, float("-inf"))
                _store_powers(logits, base, stored, labels, sums, C, row, entry, start, STORE, ROWS, ENTRIES)


@jit
def hidden_gradient_kernel(
    products: tl.tensor,
    weight: tl.tensor,
    labels: tl.tensor,
    others: tl.tensor,
    inverse: tl.tensor,
    dhidden: tl.tensor,
    weight_stride: tl.tensor,
    V: tl.tensor,
    ignore_index: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    known = tl.where((label >= 0) & (label < V), label, 0)
    rest = tl.load(others + row)
    scale = tl.load(inverse + row)
    for begin in range(0, E, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < E
        product = tl.load(products + row * E + columns, mask=inside, other=0.0)
        entry = tl.load(weight + known * weight_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.where(label == ignore_index, 0.0, (product - rest * entry) * scale)
        tl.store(dhidden + row * E + columns, gradient, mask=inside)


@jit
def gradients_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    stored: tl.tensor,
    labels: tl.tensor,
    reference: tl.tensor,
    others: tl.tensor,
    inverse: tl.tensor,
    C: tl.tensor,
    start: tl.tensor,
    ignore_index: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(C, ROWS)
    row, entry = tl.program_id(0) % row_tiles * ROWS, tl.program_id(0) // row_tiles * ENTRIES
    logits = _logits(hidden, weight, row, start + entry, E, ROWS, ENTRIES, DEPTH)
    rows = row + tl.arange(0, ROWS)
    inside = rows < C
    label = tl.load(labels + rows, mask=inside, other=ignore_index)
    base = tl.load(reference + rows, mask=inside, other=0.0)
    rest = tl.load(others + rows, mask=inside, other=0.0)
    scale = tl.load(inverse + rows, mask=inside, other=0.0)
    values = tl.exp2(logits * 1.4426950408889634 - (base * 1.4426950408889634)[:, None])
    at_label = (label - (start + entry))[:, None] == tl.arange(0, ENTRIES)[None, :]
    values = tl.where(at_label, -rest[:, None], values) * scale[:, None]
    values = tl.where((label != ignore_index)[:, None], values, 0.0)
    stored.store([row, entry], values.to(stored.dtype))
