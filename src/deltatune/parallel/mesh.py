"""The processes of a run by axis: replicas and shards, whose ranks all read packs of their own, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["ALONE", "REPLICATE", "SHARD", "Launched", "Mesh"]

REPLICATE: Final = "replicate"
SHARD: Final = "shard"


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
    """Data ranks, each of which reads packs of its own; gradients are averaged over all of them.

    ``data_size = replicate_size * shard_size``, replicas outermost: ``shard_size`` neighbours
    hold one copy of the weights among them. An axis that splits a pack would lie inside these two.
    """

    data_size: int = 1  # data ranks
    data_rank: int = 0  # which of them this process is
    shard_size: int = 1  # ranks that hold one copy of the weights

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size
        assert self.data_size % self.shard_size == 0

    @classmethod
    def of(cls, launched: Launched, *, shard: int = 1) -> Mesh:
        """The processes that a launcher started."""
        return cls(launched.world_size, launched.process_index, shard)

    @property
    def replicate_size(self) -> int:
        """Copies of the weights."""
        return self.data_size // self.shard_size

    @property
    def replicate_rank(self) -> int:
        """Which copy this process holds a part of."""
        return self.data_rank // self.shard_size

    @property
    def shard_rank(self) -> int:
        """Which part of it."""
        return self.data_rank % self.shard_size

    def weights_mesh(self, device_type: str) -> DeviceMesh:
        """The axes that weights lie on, as ``fully_shard`` takes them: ``[shard]``, or ``[replicate, shard]``.

        Makes process groups, so every process calls it, once.
        """
        if self.replicate_size == 1:
            return init_device_mesh(device_type, (self.shard_size,), mesh_dim_names=(SHARD,))
        shape = (self.replicate_size, self.shard_size)
        return init_device_mesh(device_type, shape, mesh_dim_names=(REPLICATE, SHARD))

    def sum_over_data(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the data ranks, on every one of them."""
        if self.data_size == 1:
            return value
        summed = value.clone()
        dist.all_reduce(summed)
        return summed


ALONE: Final = Mesh()
"""One process that reads every pack."""
