"""How many replicas, shards and ranks of a pack processes make."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sizes import Sizes, choose_sizes


@pytest.mark.parametrize(
    ("given", "least", "expected"),
    [
        ((None, None), 1, (8, 1, "a step with whole weights fits the device: 8 copies")),
        ((None, None), 3, (2, 4, "a step fits the device with 4 shards of the weights")),
        ((None, None), 9, (1, 8, "a step does not fit the device even with 8 shards")),
        ((None, 2), 9, (4, 2, "as the recipe says")),
        ((2, None), 9, (2, 4, "as the recipe says")),
        ((4, 2), 9, (4, 2, "as the recipe says")),
    ],
)
def test_the_fewest_shards_that_fit(given: tuple[int | None, int | None], least: int, expected: Sizes) -> None:
    found = choose_sizes(8, replicate=given[0], shard=given[1], fits=lambda shard, _: shard >= least)
    assert found == Sizes(*expected)


def fits_128(shard: int, sequence: int) -> bool:
    """A step of which each rank may hold a 128th."""
    return shard * sequence**2 >= 128


@pytest.mark.parametrize(
    ("given", "sequences", "fits", "expected"),
    [
        # as few ranks of a pack as will do, whatever the shards
        ((None, None), (1, 2, 4, 8), lambda shard, _: shard == 8, (1, 8, 1)),
        ((None, None), (1, 2, 4, 8), fits_128, (1, 8, 4)),
        ((None, None), (1, 2), fits_128, (1, 8, 2)),
        ((None, None), (1,), fits_128, (1, 8, 1)),
        ((8, None), (1, 2, 4, 8), lambda _, sequence: sequence > 2, (8, 1, 4)),
        ((None, 4), (1, 2, 4, 8), fits_128, (2, 4, 4)),
        # three do not make eight
        ((None, 1), (1, 3, 4), lambda _, sequence: sequence > 1, (8, 1, 4)),
    ],
)
def test_a_pack_is_divided_where_no_number_of_shards_fits(
    given: tuple[int | None, int | None],
    sequences: tuple[int, ...],
    fits: Callable[[int, int], bool],
    expected: tuple[int, int, int],
) -> None:
    found = choose_sizes(8, replicate=given[0], shard=given[1], sequence=None, sequences=sequences, fits=fits)
    assert (found.replicate, found.shard, found.sequence) == expected
    assert bool(found.sequence_reason) == (found.sequence > 1)


def test_shards_around_ranks_of_a_pack_are_multiples_of_them() -> None:
    asked = []
    found = choose_sizes(8, replicate=None, shard=None, sequence=4, fits=lambda *pair: bool(asked.append(pair)))
    assert asked == [(1, 4), (4, 4), (8, 4)]
    assert (found.replicate, found.shard, found.sequence, found.sequence_reason) == (1, 8, 4, "")
    with pytest.raises(ValueError, match="shard: 2 is neither 1 nor a multiple of sequence: 4"):
        choose_sizes(8, replicate=None, shard=2, sequence=4)
    with pytest.raises(ValueError, match="sequence: 3 does not divide 8 processes; choose one of 1, 2, 4, 8"):
        choose_sizes(8, replicate=None, shard=1, sequence=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 3), "shard: 3 does not divide 8 processes; choose one of 1, 2, 4, 8"),
        ((16, None), "replicate: 16 does not divide 8 processes"),
        ((2, 2), "replicate: 2 times shard: 2 is 4, and 8 processes run"),
    ],
)
def test_sizes_make_the_processes(given: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_sizes(8, replicate=given[0], shard=given[1])


def test_one_process_asks_nothing() -> None:
    assert choose_sizes(1, replicate=None, shard=None, fits=lambda *_: False) == Sizes(1, 1, "one process")


def test_neighbours_hold_one_copy() -> None:
    ranks = [Mesh(6, rank, 3) for rank in range(6)]
    assert [(mesh.replicate_rank, mesh.shard_rank) for mesh in ranks] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert {mesh.replicate_size for mesh in ranks} == {2}


def test_ranks_of_a_pack_lie_inside_the_other_axes() -> None:
    ranks = [Mesh.at(8, rank, shard=4, sequence=2) for rank in range(8)]
    assert [(mesh.data_rank, mesh.sequence_rank) for mesh in ranks] == [(r // 2, r % 2) for r in range(8)]
    assert [(mesh.replicate_rank, mesh.shard_rank) for mesh in ranks] == [(r // 4, r % 4) for r in range(8)]
    assert [mesh.rank for mesh in ranks] == [*range(8)]
    assert {(mesh.data_size, mesh.size, mesh.replicate_size) for mesh in ranks} == {(4, 8, 2)}


def test_sizes_of_very_many_processes_take_no_time() -> None:
    assert choose_sizes(2**40, replicate=2**20, shard=2**20).shard == 2**20
