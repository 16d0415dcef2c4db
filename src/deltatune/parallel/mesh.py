"""The processes of a run by axis: replicas and shards of the weights, and inside them ranks that share a pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["ALONE", "REPLICATE", "SEQUENCE", "SHARD", "Launched", "Mesh"]

REPLICATE: Final = "replicate"
SHARD: Final = "shard"
SEQUENCE: Final = "sequence"


class Launched(Protocol):
    """What is known of the processes that a launcher started, such as ``transformers.TrainingArguments``."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def process_index(self) -> int:
        """Which of them this one is."""


@dataclass(frozen=True)
class Mesh:
    """Ranks: data ranks, each of which reads packs of its own, times the ranks that share one's packs.

    ``size = data_size * sequence_size = replicate_size * shard_size``. The sequence axis is the innermost:
    ``sequence_size`` neighbours are one data rank, and hold a part of each of its packs. ``shard_size`` neighbours hold
    one copy of the weights among them; that is 1, or a multiple of ``sequence_size``. Weights know nothing of packs:
    gradients are averaged over all ranks.
    """

    data_size: int = 1  # data ranks
    data_rank: int = 0  # which of them this process belongs to
    shard_size: int = 1  # ranks that hold one copy of the weights
    sequence_size: int = 1  # ranks that hold one pack
    sequence_rank: int = 0  # which part of it is this one's
    expert_size: int = 1  # ranks that hold the routed experts together

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size
        assert 0 <= self.sequence_rank < self.sequence_size
        assert self.size % self.shard_size == 0
        assert self.shard_size == 1 or self.shard_size % self.sequence_size == 0
        assert self.size % self.expert_size == 0

    @classmethod
    def of(cls, launched: Launched, *, shard: int = 1, sequence: int = 1, expert: int = 1) -> Mesh:
        """The processes that a launcher started."""
        return cls.at(launched.world_size, launched.process_index, shard=shard, sequence=sequence, expert=expert)

    @classmethod
    def at(cls, size: int, rank: int, *, shard: int = 1, sequence: int = 1, expert: int = 1) -> Mesh:
        """One of so many processes."""
        assert size % sequence == 0
        return cls(size // sequence, rank // sequence, shard, sequence, rank % sequence, expert)

    @property
    def size(self) -> int:
        """All ranks, over which gradients are averaged."""
        return self.data_size * self.sequence_size

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.data_rank * self.sequence_size + self.sequence_rank

    @property
    def holds_parts(self) -> bool:
        """Whether a rank holds parts of weights: shards, or some of the experts."""
        return self.shard_size > 1 or self.expert_size > 1

    @property
    def replicate_size(self) -> int:
        """Copies of the weights."""
        return self.size // self.shard_size

    @property
    def replicate_rank(self) -> int:
        """Which copy this process holds a part of."""
        return self.rank // self.shard_size

    @property
    def shard_rank(self) -> int:
        """Which part of it."""
        return self.rank % self.shard_size

    def weights_mesh(self, device_type: str) -> DeviceMesh:
        """The axes that weights lie on, as ``fully_shard`` takes them: ``[shard]``, or ``[replicate, shard]``.

        Makes process groups, so every process calls it, once.
        """
        if self.replicate_size == 1:
            return init_device_mesh(device_type, (self.shard_size,), mesh_dim_names=(SHARD,))
        shape = (self.replicate_size, self.shard_size)
        return init_device_mesh(device_type, shape, mesh_dim_names=(REPLICATE, SHARD))

    def sequence_group(self, device_type: str) -> ProcessGroup | None:
        """The ranks that share this one's packs; None where it shares them with nobody.

        Makes process groups, so every process calls it, once.
        """
        if self.sequence_size == 1:
            return None
        shape = (self.data_size, self.sequence_size)
        return init_device_mesh(device_type, shape, mesh_dim_names=("data", SEQUENCE))[SEQUENCE].get_group()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of what each rank has, such as its share of a loss, on every one of them."""
        if self.size == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    def sum_over_data(self, value: Tensor) -> Tensor:
        """The sum of what each data rank has, such as a count of its packs, on every rank.

        Ranks that share packs have the same ``value``, and it counts once.
        """
        return self.sum_over_ranks(value if self.sequence_rank == 0 else torch.zeros_like(value))


ALONE: Final = Mesh()
"""One process that reads every pack."""
