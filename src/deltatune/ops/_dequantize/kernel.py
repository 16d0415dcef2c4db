"""The values of quantised matrices in Triton: a kernel for two codes a byte, one for fp8. Imported only where it runs.

Every value is read, decoded and written once: 2.5 to 3.1 bytes of memory for each in 16 bits. A program has a tile of
one matrix; where the matrix has no rows it reads two ends of groups and is done. Bits of codes become those of fp32 by
integers, which no setting of a compiler rounds, and no product is contracted with a sum (``enable_fp_fusion``), so that
the results are the reference's.
"""

# G experts, N rows, K columns, S groups of values that share a scale, B blocks of 256 such scales, P parts of rows

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._dequantize.reference import NF4
from deltatune.ops._dequantize.weight import BLOCK, GROUP, NESTED, shape_of
from deltatune.ops._jit import jit

__all__ = ["decode"]

#: Values of a program, and its warps.
_VALUES, _WARPS = 4096, 4
_QUIET_NAN: Final = tl.constexpr(0x7FC00000)


def decode(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    offsets: Tensor | None,
    format: str,
    divides: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``[..., N, K]`` of contiguous tensors, whose numbers of one byte are uint8."""
    shape = shape_of(codes, format)
    y = codes.new_empty(shape, dtype=dtype)
    if y.numel() == 0:
        return y
    (rows, columns), matrices = shape[-2:], shape[:-2].numel()
    # what is not read stands for what is not there
    ends, given = (codes, False) if offsets is None else (offsets, True)
    with torch.cuda.device(y.get_device()):
        if format == "fp8":
            tile = _VALUES // BLOCK
            high = 1 if scales.shape[-2] == rows else BLOCK
            _fp8_kernel[(matrices * triton.cdiv(rows, tile) * triton.cdiv(columns, BLOCK),)](
                codes, scales, ends, y, rows, columns, *scales.shape[-2:], given, high, tile, BLOCK,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            group = GROUP[format]
            groups, tile = rows * columns // group, _VALUES // group
            more, width = (scales, 0) if extra is None else (extra, extra.shape[-1])
            _pairs_kernel[(matrices * triton.cdiv(groups, tile),)](
                codes, scales, more, ends, y, groups, width, given, format, divides, NF4, NESTED, tile, group,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return y


@jit
def _has_rows(ends: tl.tensor, matrix: tl.tensor, GIVEN: tl.constexpr) -> tl.tensor:
    rows = 1
    if GIVEN:
        rows = tl.load(ends + matrix) - tl.load(ends + matrix - 1, mask=matrix > 0, other=0)
    return rows > 0


@jit
def _e2m1(nibble: tl.tensor) -> tl.tensor:
    size = nibble & 7
    bits = tl.where(size > 1, (size << 22) + 0x3F000000, size * 0x3F000000)
    return (bits | ((nibble & 8) << 28)).to(tl.float32, bitcast=True)


@jit
def _e4m3(byte: tl.tensor) -> tl.tensor:
    size = byte & 127
    bits = (size << 20) + 0x3C000000
    # below 2^-6 the digits stand after 0, not after 1
    small = (bits + 0x800000).to(tl.float32, bitcast=True) - 0.015625
    bits = tl.where(size < 8, small.to(tl.int32, bitcast=True), bits)
    bits = tl.where(size == 127, _QUIET_NAN, bits)
    return (bits | ((byte & 128) << 24)).to(tl.float32, bitcast=True)


@jit
def _e8m0(byte: tl.tensor) -> tl.tensor:
    bits = tl.maximum(byte << 23, 0x400000)  # 2^-127 has no exponent of its own
    return tl.where(byte == 255, _QUIET_NAN, bits).to(tl.float32, bitcast=True)


@jit
def _pairs_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    extra: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    S: tl.tensor,
    WIDTH: tl.tensor,
    GIVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    DIVIDES: tl.constexpr,
    TABLE: tl.constexpr,
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    tiles = tl.cdiv(S, GROUPS)
    matrix, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if _has_rows(ends, matrix, GIVEN):
        first = matrix * S + tile * GROUPS
        group = tl.arange(0, GROUPS)
        live = tile * GROUPS + group < S
        scale = tl.load(scales + first + group, mask=live, other=0).to(tl.int32)
        extra += matrix * WIDTH
        if FORMAT == "nf4":
            table = extra + WIDTH - NESTED - 1
            nested = tl.load(extra + (tile * GROUPS + group) // NESTED, mask=live, other=0.0)
            factor = tl.load(table + scale) * nested + tl.load(table + NESTED)
        elif FORMAT == "mxfp4":
            factor = _e8m0(scale)
        else:
            factor = _e4m3(scale)
        byte = tl.arange(0, GROUP // 2)
        at = group[:, None] * (GROUP // 2) + byte[None, :]
        pair = tl.load(codes + first * (GROUP // 2) + at, mask=live[:, None], other=0).to(tl.int32)
        if FORMAT == "nf4":
            nibble = tl.interleave(pair >> 4, pair & 15)
            place = tl.arange(0, 16)
            quantiles = tl.zeros((16,), tl.float32)
            for i in tl.static_range(16):
                quantiles = tl.where(place == i, TABLE[i], quantiles)
            value = tl.gather(quantiles, tl.reshape(nibble, (GROUPS * GROUP,)), 0)
            value = tl.reshape(value, (GROUPS, GROUP))
        else:
            value = _e2m1(tl.interleave(pair & 15, pair >> 4))
        value = value * factor[:, None]
        if FORMAT == "nvfp4":
            whole = tl.load(extra + (tile * GROUPS + group) // (S // WIDTH), mask=live, other=1.0)[:, None]
            value = tl.div_rn(value, tl.broadcast_to(whole, (GROUPS, GROUP))) if DIVIDES else value * whole
        column = tl.arange(0, GROUP)
        place = y + first * GROUP + group[:, None] * GROUP + column[None, :]
        tl.store(place, value.to(y.dtype.element_ty), mask=live[:, None])


@jit
def _fp8_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    ends: tl.tensor,
    y: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SCALE_ROWS: tl.tensor,
    SCALE_COLS: tl.tensor,
    GIVEN: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    across = tl.cdiv(K, COLS)
    tiles = tl.cdiv(N, ROWS) * across
    matrix, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if _has_rows(ends, matrix, GIVEN):
        top, left = tile // across * ROWS, tile % across * COLS
        row, column = tl.arange(0, ROWS), tl.arange(0, COLS)
        live = top + row < N
        # a tile is as wide as a block; a row with one scale has it everywhere
        block = tl.minimum(tile % across, SCALE_COLS - 1)
        factor = tl.load(
            scales + matrix * SCALE_ROWS * SCALE_COLS + (top + row) // HIGH * SCALE_COLS + block, mask=live, other=0.0
        ).to(tl.float32)
        mask = live[:, None] & (left + column < K)[None, :]
        first = (matrix * N + top) * K + left
        at = row[:, None] * K + column[None, :]
        value = _e4m3(tl.load(codes + first + at, mask=mask, other=0).to(tl.int32)) * factor[:, None]
        tl.store(y + first + at, value.to(y.dtype.element_ty), mask=mask)
