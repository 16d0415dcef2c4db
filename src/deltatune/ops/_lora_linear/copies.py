"""``target = scale * source`` for a list of matrices, one Triton launch; imported only where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Copies"]

_BLOCK = 1024  # numbers a program
_FIELDS = 6  # of the table, a matrix: where from, where to, rows, columns, strides of the target
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Copies:
    """A table of matrices on the device, made again only when one of them moved or another scale is asked for."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._table = self._scales = torch.empty(0)
        self._tiles = 0

    def run(self, matrices: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Copies every ``(contiguous source, target of any strides, scale)``; sources share a dtype, and targets do."""
        source, target, _ = matrices[0]
        key = tuple((a.data_ptr(), b.data_ptr(), scale) for a, b, scale in matrices)
        if key != self._key:
            self._build(matrices)
            self._key = key
        with torch.cuda.device(target.device.index) if target.is_cuda else nullcontext():
            _kernel[(len(matrices), self._tiles)](
                self._table, self._scales, _DTYPES[source.dtype], _DTYPES[target.dtype], _FIELDS, _BLOCK
            )

    def _build(self, matrices: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        device = matrices[0][1].device
        rows = [(a.data_ptr(), b.data_ptr(), *b.shape, *b.stride()) for a, b, _ in matrices]
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._scales = torch.tensor([scale for _, _, scale in matrices], dtype=torch.float32).to(device)
        self._tiles = max(triton.cdiv(b.numel(), _BLOCK) for _, b, _ in matrices)


def _copy(
    table: tl.tensor,
    scales: tl.tensor,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    entry = table + tl.program_id(0) * FIELDS
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    target = tl.load(entry + 1).to(tl.pointer_type(TARGET))
    rows, cols = tl.load(entry + 2), tl.load(entry + 3)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * cols
    values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scales + tl.program_id(0))
    place = at // cols * tl.load(entry + 4) + at % cols * tl.load(entry + 5)
    tl.store(target + place, values.to(TARGET), mask=inside)


_kernel = triton.jit(_copy)
