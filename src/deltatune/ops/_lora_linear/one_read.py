"""``t = dy B`` and ``dB = dy^T u`` in one read of dy: two Triton kernels. Imported only where they run.

A program of the first keeps its columns of dB in registers while it goes over rows: of every tile of dy it adds
``tile^T u`` to them and writes ``tile B``, a part of t. The second adds up the parts of both, always in the same order.
No atomics: the same inputs give the same bits on the same device.
"""

# M tokens, N output width, W columns of B and u

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Tile", "both_products"]


class Tile(NamedTuple):
    """What a program of the first kernel reads at a time, and with what."""

    rows: int  # of dy
    cols: int  # of dy; the program's share of dB
    warps: int  # of a program
    stages: int  # tiles of dy whose loads are in flight
    programs: int  # on a multiprocessor at once


_TILES: Final = {16: Tile(128, 256, 8, 3, 1), 32: Tile(64, 256, 4, 5, 1)}
#: of the second kernel: numbers a program, parts it reads at once
_NUMBERS: Final = 512
_AHEAD: Final = 4


def both_products(dy: Tensor, up: Tensor, narrow: Tensor, t: Tensor, tile: Tile | None = None) -> Tensor:
    """Writes ``t = dy up`` ``[M, W]``, and returns ``dy^T narrow`` ``[N, W]`` in fp32.

    Args:
        dy: ``[M, N]`` in bf16 or fp16, as are the others; rows dense, each beginning at a multiple of 16 bytes.
        up: ``[N, W]``, rows dense; W is 16 or 32.
        narrow: ``[M, W]``, rows dense.
        t: ``[M, W]``, rows dense.
        tile: other sizes than the measured ones.

    The parts take ``4 M W ceil(N / cols)`` and about ``4 N W`` bytes for each row of programs, freed on return.
    """
    (tokens, outer), width = dy.shape, up.shape[1]
    rows, cols, warps, stages, programs = tile or _TILES[width]
    across, tiles = triton.cdiv(outer, cols), triton.cdiv(tokens, rows)
    down = max(min(_multiprocessors(dy.device) * programs // across, tiles), 1)
    sums = dy.new_empty(outer, width, dtype=torch.float32)
    sum_parts = dy.new_empty(down, outer, width, dtype=torch.float32)
    t_parts = t if across == 1 else dy.new_empty(across, tokens, width, dtype=torch.float32)
    source = TensorDescriptor(dy, [tokens, outer], [dy.stride(0), 1], [rows, cols])
    strides, steps = (up.stride(0), narrow.stride(0), t_parts.stride(-2)), triton.cdiv(tiles, down)
    options = {"ROWS": rows, "COLS": cols, "num_warps": warps, "num_stages": stages}
    _parts_kernel[(across, down)](
        source, up, narrow, t_parts, sum_parts, *strides, tokens, outer, steps, width, **options
    )
    t_blocks = 0 if across == 1 else triton.cdiv(tokens * width, _NUMBERS)
    of_t, of_sums = (tokens * width, across, t_blocks), (outer * width, down)
    _totals_kernel[(t_blocks + triton.cdiv(outer * width, _NUMBERS),)](
        t_parts, t, sum_parts, sums, t.stride(0), *of_t, *of_sums, width, _NUMBERS, _AHEAD, num_warps=4
    )
    return sums


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _parts(
    dy: tl.tensor_descriptor,
    up: tl.tensor,
    narrow: tl.tensor,
    t_parts: tl.tensor,
    sum_parts: tl.tensor,
    up_stride: tl.tensor,
    narrow_stride: tl.tensor,
    t_stride: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    steps: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    column, turn, turns = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    cols, wide = column * COLS + tl.arange(0, COLS), tl.arange(0, W)
    there = (cols < N)[:, None]
    weight = tl.load(up + cols[:, None] * up_stride + wide[None, :], mask=there, other=0.0)
    sums = tl.zeros((COLS, W), tl.float32)
    for step in range(steps):
        start = (turn + step * turns) * ROWS
        rows = start + tl.arange(0, ROWS)
        here, at = (rows < M)[:, None], rows.to(tl.int64)[:, None]
        tile = dy.load([start, column * COLS])
        low = tl.load(narrow + at * narrow_stride + wide[None, :], mask=here, other=0.0)
        sums = tl.dot(tile.T, low, sums)
        part = tl.dot(tile, weight)
        place = t_parts + (column.to(tl.int64) * M + at) * t_stride + wide[None, :]
        tl.store(place, part.to(t_parts.dtype.element_ty), mask=here)
    tl.store(sum_parts + (turn.to(tl.int64) * N + cols[:, None]) * W + wide[None, :], sums, mask=there)


def _totals(
    t_parts: tl.tensor,
    t: tl.tensor,
    sum_parts: tl.tensor,
    sums: tl.tensor,
    t_stride: tl.tensor,
    t_size: tl.tensor,
    t_num: tl.tensor,
    t_blocks: tl.tensor,
    sum_size: tl.tensor,
    sum_num: tl.tensor,
    W: tl.constexpr,
    NUMBERS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    if block < t_blocks:
        at = block * NUMBERS + tl.arange(0, NUMBERS)
        total = _total(t_parts, at, t_size, t_num, NUMBERS, AHEAD)
        place = t + (at // W).to(tl.int64) * t_stride + at % W
        tl.store(place, total.to(t.dtype.element_ty), mask=at < t_size)
    else:
        at = (block - t_blocks) * NUMBERS + tl.arange(0, NUMBERS)
        tl.store(sums + at, _total(sum_parts, at, sum_size, sum_num, NUMBERS, AHEAD), mask=at < sum_size)


def _add_up(
    parts: tl.tensor, at: tl.tensor, size: tl.tensor, num: tl.tensor, NUMBERS: tl.constexpr, AHEAD: tl.constexpr
) -> tl.tensor:
    ahead, total = tl.arange(0, AHEAD)[:, None], tl.zeros((NUMBERS,), tl.float32)
    place = parts + at[None, :] + ahead.to(tl.int64) * size
    for first in range(0, num, AHEAD):
        total += tl.sum(tl.load(place, mask=(at < size)[None, :] & (ahead < num - first), other=0.0), axis=0)
        place += AHEAD * size
    return total


_total = triton.jit(_add_up)
_parts_kernel = triton.jit(_parts, do_not_specialize=["M", "steps"])
_totals_kernel = triton.jit(_totals, do_not_specialize=["t_num", "t_blocks", "sum_num"])
