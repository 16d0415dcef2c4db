"""Writing adapters into the operands of their products, in the compute dtype: one launch for a group on a GPU."""

# K input width, N output width, R rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._lora_linear.layout import Layout, Operands

__all__ = ["Refresh"]


class Refresh:
    """Keeps ``Operands`` equal to the A and B of their slots.

    Writes go around the operands' version counters: the same values again, between a forward and its backward, are no
    change. Where A or B did change, by their own counters, the operands' are raised, and a backward of what ran before
    is refused as torch refuses it for A and B themselves.
    """

    def __init__(self, layout: Layout, operands: Operands) -> None:
        self._down: list[tuple[Tensor, ...]] = []
        self._up: list[Tensor] = []
        self._scale: list[Tensor] = []
        for slot in layout.slots:
            target, buffer = layout.targets[slot.target], operands.bordered[slot.target]
            columns, first = slice(slot.offset, slot.offset + slot.rank), slot.offset - target.offset
            copies = [operands.rows[columns], operands.down[:, columns].mT]
            if layout.backward_border:
                copies.append(buffer[target.outer + first : target.outer + first + slot.rank, : layout.inner])
            self._down.append(tuple(copy.data for copy in copies))
            self._up.append(operands.up[slot.target][:, first : first + slot.rank].data)
            self._scale.append(operands.scale[columns].data)
        self._operands = (operands.down, operands.rows, operands.scale, *operands.bordered, *operands.up)
        self._versions: tuple[int, ...] = ()
        self._scales: tuple[float, ...] = ()
        self._table: Any = None

    def run(self, down: Sequence[Tensor], up: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Writes ``A [R, K]``, ``B [N, R]`` and the scaling of every slot."""
        if tuple(scales) != self._scales:
            for place, scale in zip(self._scale, scales, strict=True):
                place.fill_(scale)
            self._scales = tuple(scales)
        with torch.no_grad():
            if not self._launch(down, up, scales):
                self._copy(down, up, scales)
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in (*down, *up))
        if versions != self._versions:
            torch.autograd.graph.increment_version(self._operands)
            self._versions = versions

    def _copy(self, down: Sequence[Tensor], up: Sequence[Tensor], scales: Sequence[float]) -> None:
        for a, b, scale, rows, columns in zip(down, up, scales, self._down, self._up, strict=True):
            for place in rows:
                place.copy_(a)
            columns.copy_(b.to(torch.promote_types(b.dtype, torch.float32)) * scale)

    def _launch(self, down: Sequence[Tensor], up: Sequence[Tensor], scales: Sequence[float]) -> bool:
        """One kernel for all of them, where Triton runs here."""
        sources = (*down, *up)
        if not all(tensor.is_cuda and tensor.is_contiguous() for tensor in sources):
            return False
        if len({tensor.dtype for tensor in sources}) > 1 or torch.float64 in (down[0].dtype, self._up[0].dtype):
            return False
        try:
            from deltatune.ops._lora_linear.copies import Copies
        except ModuleNotFoundError:  # no Triton
            return False
        if self._table is None:
            self._table = Copies()
        pairs = [(a, place, 1.0) for a, places in zip(down, self._down, strict=True) for place in places]
        pairs += list(zip(up, self._up, scales, strict=True))
        self._table.run(pairs)
        return True
