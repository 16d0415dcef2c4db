"""Which documents of a pack go whole to which of its ranks."""

from __future__ import annotations

import numpy as np
import pytest

from deltatune.packing.by_rank import WholeDocuments
from deltatune.packing.shuffled import pack_shuffled


def in_parts(lengths: list[int], divided: list[list[int]]) -> list[list[int]]:
    return [[lengths[number] for number in part] for part in divided]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_full_packs_of_short_documents_are_divided(ranks: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 4000).astype(int).clip(2, 1024)
    packs = [*pack_shuffled(lengths, 4096 * ranks)][:-1]
    divided = [WholeDocuments(ranks).divide(lengths[members].tolist(), 4096) for members in packs]
    for members, parts in zip(packs, divided, strict=True):
        if parts is not None:
            assert len(parts) == ranks
            assert sorted(number for part in parts for number in part) == list(range(len(members)))
            assert all(part == sorted(part) for part in parts)
            assert all(sum(lengths[members][part]) <= 4096 for part in parts)
    spare = [4096 * ranks - lengths[members].sum() for members in packs]
    assert np.median(spare) <= 1, "there is no room to spare"
    assert sum(parts is None for parts in divided) <= len(packs) // 20


def test_the_shortest_fill_what_the_longest_leave() -> None:
    lengths = [50, 9, 8, 70, 7, 6, 40, 10]
    divided = WholeDocuments(2).divide(lengths, 100)
    assert divided is not None
    assert [sum(part) for part in in_parts(lengths, divided)] == [100, 100]


@pytest.mark.parametrize("lengths", [[65, 3], [60, 60, 8], [40, 40, 40], [33, 33, 31, 31]])
def test_what_does_not_fit_whole_is_not_divided(lengths: list[int]) -> None:
    assert WholeDocuments(2).divide(lengths, 64) == ([[0, 2], [1, 3]] if len(lengths) == 4 else None)


def test_a_rank_alone_divides_nothing() -> None:
    assert WholeDocuments(1).divide([3], 64) is None


def test_attention_may_be_so_uneven_as_an_exchange_is_worth() -> None:
    lengths = [64] + [4] * 16
    above_the_mean = (64**2 - 16 * 4**2) / 2
    assert WholeDocuments(2, above_the_mean / 64).divide(lengths, 64) is not None
    assert WholeDocuments(2, above_the_mean / 64 - 1).divide(lengths, 64) is None
