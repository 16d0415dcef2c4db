"""Grouped products in two Triton kernels that read the groups' ends on the device. Imported only where it runs.

A program of the first computes one tile of the result. Groups of unknown sizes need at most one tile each more than
their rows would in one piece, so that many programs are launched, and each finds its rows by counting tiles. The rows
past the last group are one group more, which the kernel fills with zeros. A program of the second owns a tile of one
group's sums and goes over all rows of the group. No atomics: the same inputs give the same bits on the same device.
"""

# R rows, G groups, K input width, N output width, W width of the narrow rows, P and Q widths of summed products

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deltatune.ops._jit import jit
from deltatune.ops._numerics import unit_stride

__all__ = ["Tile", "gram", "product", "reads_by_tile"]


class Tile(NamedTuple):
    """What a program computes, reads at a time, and with what."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


_LEAST = 16  # sides of a product on tensor cores


def product(
    x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """``weight_g x_r (+ up_g narrow_r)`` ``[R, N]``, one fp32 sum for both; zero past the last group.

    Args:
        x: ``[R, K]`` in bf16, fp16 or fp32.
        weight: ``[G, N, K]``, any strides.
        offsets: int32 ``[G]``.
        narrow: ``[R, W]``, or None.
        up: ``[G, N, W]``, or None.
        tile: other sizes than the default ones.
    """
    (rows, inner), (groups, outer, _) = x.shape, weight.shape
    y = x.new_empty(rows, outer)
    if y.numel() == 0:
        return y
    size = tile or _product_tile(rows, groups, outer, inner, x.dtype)
    x = unit_stride(x)
    source = _by_tile(x, weight, size)
    low, to_low, width = (x, weight, 0) if narrow is None or up is None else (unit_stride(narrow), up, up.shape[2])
    tiles = triton.cdiv(rows, size.rows) + groups + 1
    with torch.cuda.device(x.get_device()):
        _product_kernel[(tiles * triton.cdiv(outer, size.cols),)](
            *(source or (x, weight)), low, to_low, offsets, y, x.stride(0), low.stride(0), weight.stride(),
            to_low.stride(), rows, groups, outer, inner, width, triton.next_power_of_2(groups + 1), size.rows,
            size.cols, size.depth, _depth_of(width), _precision(x.dtype), source is not None, weight.stride(2) == 1,
            num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
    return y


def gram(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """``sum over the rows of g of left_r right_r^T`` ``[G, P, Q]`` in fp32 sums, given in ``dtype``.

    Args:
        left: ``[R, P]`` in bf16, fp16 or fp32.
        right: ``[R, Q]`` in the same.
        offsets: int32 ``[G]``.
        dtype: of the result.
        tile: ``rows`` and ``cols`` of the result that a program owns, ``depth`` rows that it reads at a time.
    """
    groups, high, wide = offsets.shape[0], left.shape[1], right.shape[1]
    sums = left.new_empty(groups, high, wide, dtype=dtype)
    if sums.numel() == 0:
        return sums
    size = tile or _gram_tile(high, wide)
    left, right = unit_stride(left), unit_stride(right)
    grid = (triton.cdiv(high, size.rows) * triton.cdiv(wide, size.cols), groups)
    with torch.cuda.device(left.get_device()):
        _gram_kernel[grid](
            left, right, offsets, sums, left.stride(0), right.stride(0), high, wide, size.rows, size.cols, size.depth,
            _precision(left.dtype), num_warps=size.warps, num_stages=size.stages,
        )  # fmt: skip
    return sums


def _product_tile(rows: int, groups: int, outer: int, inner: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 64, 32, 4, 2)
    high = 128 if rows >= 64 * groups else 64
    if high == 128 and outer >= 512 and inner >= 1024:
        # H200, 512 rows a group: 904 us against 956 for a width of 2048 to 1024, 471 against 499 to 512; shallower
        # products, 512 to 2048, lose 1%
        return Tile(high, 256, 64, 8, 4)
    cols = 128 if outer > 64 else max(_LEAST, triton.next_power_of_2(outer))
    return Tile(high, cols, 64 if inner > 32 else 32, 8 if high * cols > 64 * 128 else 4, 3)


def _gram_tile(high: int, wide: int) -> Tile:
    rows, cols = (min(128, max(_LEAST, triton.next_power_of_2(width))) for width in (high, wide))
    return Tile(rows, cols, 64, 8 if rows == cols == 128 else 4, 3)


def reads_by_tile(x: Tensor, weight: Tensor, tile: Tile) -> bool:
    """Whether the tensor memory accelerator reads both operands."""
    return _by_tile(x, weight, tile) is not None


def _by_tile(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """x ``[R, K]`` and all matrices on top of each other, for the tensor memory accelerator; None where it cannot read.

    A tile that goes past a group's rows, or past a matrix, reads those of the next: of rows and columns that are not
    stored. What it multiplies along K has to end with the matrix.
    """
    groups, inner, size = weight.shape[0], weight.shape[2], x.element_size()
    upright = weight if weight.stride(2) == 1 else weight.mT
    high, step = upright.shape[1], upright.stride(1)
    reads = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    dense = upright.stride() == (high * step, step, 1) and x.stride(0) >= inner
    aligned = all(n % 16 == 0 for n in (x.stride(0) * size, step * size, x.data_ptr(), upright.data_ptr()))
    if not (dense and aligned and inner % tile.depth == 0 and (reads or not x.is_cuda)):
        return None
    block = [tile.cols, tile.depth] if upright is weight else [tile.depth, tile.cols]
    rows = TensorDescriptor(x, [x.shape[0], inner], [x.stride(0), 1], [tile.rows, tile.depth])
    shape = [groups * high, upright.shape[2]]
    return rows, TensorDescriptor(upright, shape, [step, 1], block)


def _depth_of(width: int) -> int:
    depth: int = triton.next_power_of_2(width)
    return 0 if width == 0 else min(64, max(_LEAST, depth))


def _precision(dtype: torch.dtype) -> str:
    # fp32 operands are multiplied as such, not rounded to tf32
    return "ieee" if dtype == torch.float32 else "tf32"


@jit
def _add_product(
    total: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    rows: tl.tensor,
    here: tl.tensor,
    weight: tl.tensor,
    strides: tl.tuple,
    cols: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """``total + x_rows weight^T``, of a weight ``[N, K]`` that starts at ``weight``."""
    depth = tl.arange(0, DEPTH)
    from_x = x + rows.to(tl.int64)[:, None] * x_stride + depth[None, :]
    from_weight = weight + cols[None, :] * strides[1] + depth[:, None] * strides[2]
    inside = (cols < N)[None, :]
    for start in range(0, K, DEPTH):
        left = depth < K - start
        a = tl.load(from_x, mask=here[:, None] & left[None, :], other=0.0)
        b = tl.load(from_weight, mask=left[:, None] & inside, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        from_x += DEPTH
        from_weight += DEPTH * strides[2]
    return total


@jit
def _product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    offsets: tl.tensor,
    y: tl.tensor,
    x_stride: tl.tensor,
    low_stride: tl.tensor,
    weight_strides: tl.tuple,
    up_strides: tl.tuple,
    R: tl.tensor,
    G: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    W: tl.tensor,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOW_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TILE: tl.constexpr,
    UPRIGHT: tl.constexpr,
) -> None:
    across = tl.cdiv(N, COLS)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    # of every group, and of the absent rows behind them: its rows, and the tiles up to its end
    group = tl.arange(0, GROUPS)
    ends = tl.load(offsets + group, mask=group < G, other=R)
    begins = tl.load(offsets + group - 1, mask=(group > 0) & (group <= G), other=0)
    begins = tl.where(group <= G, begins, R)
    upto = tl.cumsum((ends - begins + ROWS - 1) // ROWS, 0)
    mine = tl.sum((upto <= tile).to(tl.int32), 0)
    if mine <= G:
        is_mine = group == mine
        begin, end = tl.sum(tl.where(is_mine, begins, 0), 0), tl.sum(tl.where(is_mine, ends, 0), 0)
        before = tl.sum(tl.where(group == mine - 1, upto, 0), 0)
        rows = begin + (tile - before) * ROWS + tl.arange(0, ROWS)
        cols = column * COLS + tl.arange(0, COLS)
        here = rows < end
        total = tl.zeros((ROWS, COLS), tl.float32)
        if mine < G:
            at = mine.to(tl.int64)
            if BY_TILE:
                first = begin + (tile - before) * ROWS
                for start in range(0, K, DEPTH):
                    a = x.load([first, start])
                    if UPRIGHT:
                        b = weight.load([mine * N + column * COLS, start]).T
                    else:
                        b = weight.load([mine * K + start, column * COLS])
                    total = tl.dot(a, b, total, input_precision=PRECISION)
            else:
                total = _add_product(
                    total, x, x_stride, rows, here, weight + at * weight_strides[0], weight_strides, cols, N, K, DEPTH,
                    PRECISION,
                )  # fmt: skip
            if LOW_DEPTH > 0:
                total = _add_product(
                    total, low, low_stride, rows, here, up + at * up_strides[0], up_strides, cols, N, W, LOW_DEPTH,
                    PRECISION,
                )  # fmt: skip
        place = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=here[:, None] & (cols < N)[None, :])


@jit
def _gram_kernel(
    left: tl.tensor,
    right: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    P: tl.tensor,
    Q: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    across = tl.cdiv(Q, COLS)
    group = tl.program_id(1)
    rows = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    begin, end = tl.load(offsets + group - 1, mask=group > 0, other=0), tl.load(offsets + group)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, DEPTH):
        at = start + tl.arange(0, DEPTH)
        here = at < end
        a = tl.load(
            left + at.to(tl.int64)[None, :] * left_stride + rows[:, None], mask=here[None, :] & (rows < P)[:, None],
            other=0.0,
        )  # fmt: skip
        b = tl.load(
            right + at.to(tl.int64)[:, None] * right_stride + cols[None, :], mask=here[:, None] & (cols < Q)[None, :],
            other=0.0,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION)
    place = sums + (group.to(tl.int64) * P + rows[:, None]) * Q + cols[None, :]
    tl.store(place, total.to(sums.dtype.element_ty), mask=(rows < P)[:, None] & (cols < Q)[None, :])
