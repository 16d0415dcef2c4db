"""How many replicas and shards processes make."""

from __future__ import annotations

import pytest

from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sizes import Sizes, choose_sizes


@pytest.mark.parametrize(
    ("given", "least", "expected"),
    [
        ((None, None), 1, (8, 1, "a step with whole weights fits the device: 8 replicas")),
        ((None, None), 3, (2, 4, "a step fits the device with 4 shards of the weights")),
        ((None, None), 9, (1, 8, "a step does not fit the device even with 8 shards")),
        ((None, 2), 9, (4, 2, "as the recipe says")),
        ((2, None), 9, (2, 4, "as the recipe says")),
        ((4, 2), 9, (4, 2, "as the recipe says")),
    ],
)
def test_the_fewest_shards_that_fit(given: tuple[int | None, int | None], least: int, expected: Sizes) -> None:
    assert choose_sizes(8, replicate=given[0], shard=given[1], fits=lambda shard: shard >= least) == expected


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
    assert choose_sizes(1, replicate=None, shard=None, fits=lambda _: False) == (1, 1, "one process")


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
