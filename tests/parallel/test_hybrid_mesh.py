"""On machines of eight GPUs a copy of the weights lies in each, and copies lie across."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from deltatune.parallel.mesh import REPLICATE, SHARD, Mesh
from deltatune.parallel.sizes import choose_sizes
from tools.processes import as_rank

MACHINE = 8


@pytest.mark.parametrize("rank", [0, 13, 63])
def test_shards_lie_in_a_machine_and_copies_across(rank: int) -> None:
    sizes = choose_sizes(64, replicate=8, shard=8)
    with as_rank(rank, 64):
        mesh = Mesh.at(64, rank, shard=sizes.shard)
        weights = mesh.weights_mesh("cpu")
        groups = {name: dist.get_process_group_ranks(weights[name].get_group()) for name in (REPLICATE, SHARD)}
    machine, place = divmod(rank, MACHINE)
    assert groups[SHARD] == list(range(machine * MACHINE, (machine + 1) * MACHINE))
    assert groups[REPLICATE] == list(range(place, 64, MACHINE))
    assert (mesh.replicate_rank, mesh.shard_rank) == (machine, place)
    # gradients are averaged over all, and each reads packs of its own
    assert (mesh.size, mesh.data_size, mesh.data_rank) == (64, 64, rank)


def test_ranks_of_a_pack_are_a_part_of_a_copy() -> None:
    with as_rank(13, 64):
        mesh = Mesh.at(64, 13, shard=8, sequence=4)
        group = mesh.sequence_group("cpu")
        assert group is not None
        assert dist.get_process_group_ranks(group) == [12, 13, 14, 15]
    assert mesh.data_size == 16
