"""``[h | h A^T | 0]`` for ``h = silu(gate) up`` in one Triton kernel. Imported only where it runs.

A program goes over all columns of its rows, writes h and keeps ``h A^T`` of those rows in registers.
"""

# M tokens, K width of the activation, W columns of A^T

from __future__ import annotations

from typing import Final, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tile", "write_extended"]


class Tile(NamedTuple):
    """What a program computes at a time, and with how many warps."""

    rows: int
    cols: int
    warps: int


_TILE: Final = Tile(32, 128, 4)
#: the same where tokens are too few to fill the device with those
_FEW: Final = Tile(16, 512, 8)
_FEWEST: Final = 8192
#: columns of zeros written at a time
_ZEROS: Final = 16


def write_extended(gate: Tensor, up: Tensor, down: Tensor, extended: Tensor, tile: Tile | None = None) -> None:
    """Writes ``[h | h down | 0]``.

    Args:
        gate: ``[M, K]`` in bf16 or fp16, as are the others; rows of all of them are dense.
        up: ``[M, K]``.
        down: ``[K, W]``; W is 16 or 32.
        extended: ``[M, K + W + 16 n]``.
        tile: another size than the measured ones.
    """
    (tokens, inner), width = gate.shape, down.shape[1]
    rows, cols, warps = tile or (_FEW if tokens < _FEWEST else _TILE)
    if tokens:
        _kernel[(triton.cdiv(tokens, rows),)](
            gate,
            up,
            down,
            extended,
            gate.stride(0),
            up.stride(0),
            down.stride(0),
            extended.stride(0),
            tokens,
            inner,
            extended.shape[1] - inner - width,
            width,
            rows,
            cols,
            _ZEROS,
            not triton.knobs.runtime.interpret,  # which knows no assembly
            num_warps=warps,
            num_stages=1,  # pipelined loads go through shared memory, in every layout that reads them
        )


def _write_extended(
    gate: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    extended: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    down_stride: tl.tensor,
    extended_stride: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    zeros: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ZEROS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> None:
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, wide = tl.arange(0, ROWS)[:, None], tl.arange(0, W)[None, :]
    gate += first_row * gate_stride
    up += first_row * up_stride
    extended += first_row * extended_stride
    here = rows < M - first_row
    low = tl.zeros((ROWS, W), tl.float32)
    for first in range(0, K, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here & (cols < K)[None, :]
        x = tl.load(gate + rows * gate_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(up + rows * up_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(down + cols[:, None] * down_stride + wide, mask=(cols < K)[:, None], other=0.0)
        if ASSEMBLY:
            h = _computed_once((x * _fast_sigmoid(x) * y).to(extended.dtype.element_ty))
        else:
            h = (x * tl.sigmoid(x) * y).to(extended.dtype.element_ty)
        tl.store(extended + rows * extended_stride + cols[None, :], h, mask=mask)
        low = tl.dot(h, weight, low)
    border = extended + rows * extended_stride + K
    tl.store(border + wide, low.to(extended.dtype.element_ty), mask=here)
    nothing = tl.zeros((ROWS, ZEROS), extended.dtype.element_ty)
    for first in range(W, W + zeros, ZEROS):
        tl.store(border + first + tl.arange(0, ZEROS)[None, :], nothing, mask=here)


def _once(x: tl.tensor) -> tl.tensor:
    """16-bit numbers, computed in one layout and moved to the others.

    The compiler would rather compute them again for every layout that a store or a product wants: 296 us at best in
    place of 178 (6144 columns, 16384 rows, H200, Triton 3.6).
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


def _sigmoid(x: tl.tensor) -> tl.tensor:
    """``1 / (1 + 2^(-x log2 e))`` by the approximate instructions, within a few units in the last place of fp32.

    Without the corrections for subnormal numbers, a third of all instructions with ``tl.sigmoid``: 162 us, not 178.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=r,r",
        [x * -1.4426950408889634],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


_computed_once = triton.jit(_once)
_fast_sigmoid = triton.jit(_sigmoid)
_kernel = triton.jit(_write_extended, do_not_specialize=["M"])
