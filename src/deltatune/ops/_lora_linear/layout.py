"""What a group of layers with adapters looks like, and the tensors that hold it."""

# K input width, N output width, W border width (all adapters of the group, padded), R rank

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Layout", "Operands", "Slot", "Target"]

#: A target's columns that adapters use are read in whole multiples of this: what tensor cores multiply at once.
_MULTIPLE = 16


class Target(NamedTuple):
    """One linear layer of a group: its output width, and its columns of the border."""

    outer: int
    offset: int
    width: int


class Slot(NamedTuple):
    """One adapter: the number of its layer among the targets, its first column of the border, and its rank."""

    target: int
    offset: int
    rank: int


class Layout(NamedTuple):
    """What a group of layers looks like: integers alone, the same for every decoder layer of a type.

    Attributes:
        inner: K, the width of the input that the layers share.
        width: W, the columns of the border; those that no adapter uses are zero.
        forward_border: whether forward is one product with ``[W | s B]``, or one that adds to the narrow product.
        backward_border: the same for backward and ``[W; A]``.
        targets: the layers.
        slots: the adapters.
    """

    inner: int
    width: int
    forward_border: bool
    backward_border: bool
    targets: tuple[Target, ...]
    slots: tuple[Slot, ...]

    def select(self, numbers: tuple[int, ...]) -> Layout:
        """The layout of some of the targets."""
        targets = tuple(self.targets[number] for number in numbers)
        slots = tuple(
            Slot(numbers.index(slot.target), slot.offset, slot.rank) for slot in self.slots if slot.target in numbers
        )
        return self._replace(targets=targets, slots=slots)

    def used(self, number: int) -> slice:
        """The columns of a target up to its last adapter, padded as the tensor cores need them."""
        target = self.targets[number]
        ends = [slot.offset + slot.rank - target.offset for slot in self.slots if slot.target == number]
        return slice(target.offset, target.offset + min(-(-ends[-1] // _MULTIPLE) * _MULTIPLE, target.width))


@dataclass(frozen=True, eq=False)
class Operands:
    """Copies of the adapters in the compute dtype, laid out for the products, beside the frozen weights.

    Attributes:
        down: ``[K, W]``, the columns of ``A^T`` of all adapters.
        rows: ``[W, K]``, the same transposed.
        scale: fp32 ``[W]``, the scaling of the adapter that owns a column.
        bordered: a target's ``[[W, s B], [A, 0]]`` ``[N + width, K + W]``, without the columns where the layout has no
            forward border and without the rows where it has no backward border.
        up: a target's ``s B`` ``[N, width]``.
    """

    down: Tensor
    rows: Tensor
    scale: Tensor
    bordered: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
