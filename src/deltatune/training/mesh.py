"""The processes of a run by axis: how many read packs of their own, which of them this one is, sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["ALONE", "Mesh"]


@dataclass(frozen=True)
class Mesh:
    """One axis so far: data parallel, whose ranks each read packs of their own and average gradients."""

    data_size: int = 1  # ranks of the data axis
    data_rank: int = 0  # this process on it

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size

    @classmethod
    def of(cls, args: TrainingArguments) -> Mesh:
        """The processes that a launcher started, as accelerate found them."""
        return cls(args.world_size, args.process_index)

    def sum_over_data(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the data axis, on every rank of it."""
        if self.data_size == 1:
            return value
        from accelerate.utils import reduce

        summed: Tensor = reduce(value, reduction="sum")
        return summed


ALONE: Final = Mesh()
"""One process that reads every pack."""
