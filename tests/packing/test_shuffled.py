"""Packs of shuffled documents: the laws that best-fit decreasing cannot hold, at its fill."""

import time
from itertools import pairwise

import numpy as np
import pytest

from deltatune.packing.bins import pack
from deltatune.packing.shuffled import _Queue, pack_ahead, pack_shuffled


def two_sources(rng):
    return np.concatenate([rng.integers(80, 200, 8000), rng.integers(300, 1200, 2000)])


def long_tailed(rng):
    return np.clip(rng.lognormal(5.6, 1.0, 10_000).astype(int), 8, 8192)


def chats(rng):
    return np.clip(rng.gamma(1.2, 400, 10_000).astype(int) + 30, 1, 4096)


def middling(rng):
    return rng.integers(300, 1200, 6000)


CASES = [(two_sources, 4096), (two_sources, 16384), (long_tailed, 8192), (long_tailed, 16384), (chats, 4096)]


def between(packs, lengths):
    """Share of the variance of length between packs, by its definition."""
    within = sum(((lengths[p] - lengths[p].mean()) ** 2).sum() for p in packs)
    return 1 - within / ((lengths - lengths.mean()) ** 2).sum()


@pytest.mark.parametrize(("lengths", "capacity"), [*CASES, (middling, 4096)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_document_is_in_one_pack_and_packs_are_as_full_as_best_fit(lengths, capacity, seed):
    lengths = lengths(np.random.default_rng(3))
    packs = pack_shuffled(lengths, capacity, seed=seed)
    assert sorted(packs.members.tolist()) == list(range(lengths.size))
    assert max(lengths[members].sum() for members in packs) <= capacity
    # one pack of a small set may be more than the share that is allowed of a large one
    assert len(packs) <= max(len(pack(lengths, capacity)) * 1.003, len(pack(lengths, capacity)) + 1)


@pytest.mark.parametrize(("lengths", "capacity"), CASES)
def test_little_of_the_variance_of_length_lies_between_packs(lengths, capacity):
    lengths = lengths(np.random.default_rng(3))
    assert between(pack_shuffled(lengths, capacity), lengths) < 0.1
    assert between([np.array(members) for members in pack(lengths, capacity)], lengths) > 0.8


def test_packs_of_one_source_are_as_rare_as_chance_makes_them():
    lengths = two_sources(np.random.default_rng(3))
    long = lengths >= 300
    packs = pack_shuffled(lengths, 4096)
    # 16 documents, one in five of them long: 0.8 ** 16
    assert np.mean([long[p].all() or not long[p].any() for p in packs]) < 0.03


def test_packs_differ_with_the_seed_and_with_nothing_else():
    lengths = two_sources(np.random.default_rng(3))
    one, again, other = (pack_shuffled(lengths, 4096, seed=seed) for seed in ((5, 1), (5, 1), (5, 2)))
    assert np.array_equal(one.members, again.members)
    assert np.array_equal(one.starts, again.starts)
    met = [{frozenset(pair) for p in packs for pair in pairwise(p.tolist())} for packs in (one, other)]
    assert len(met[0] & met[1]) < 0.02 * len(met[0])


def test_long_documents_are_packed_as_best_fit_decreasing_does():
    lengths = np.random.default_rng(0).integers(600, 2400, 5000)
    assert len(pack_shuffled(lengths, 4096)) == len(pack(lengths, 4096))


@pytest.mark.parametrize("lengths", [[], [7], [8], [8, 8, 8], [1] * 20, [8, 1, 8, 1]])
def test_small_sets(lengths):
    packs = pack_shuffled(np.array(lengths, dtype=np.int64), 8)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert len(packs) == len(pack(lengths, 8))


def test_many_at_once_do_not_disturb_each_other():
    """Fuzz: every document once, no pack over its capacity, no pack empty."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(rng.integers(1, 300))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 1500)))
        packs = pack_shuffled(lengths, capacity, seed=int(rng.integers(100)))
        assert sorted(packs.members.tolist()) == list(range(lengths.size))
        assert all(0 < lengths[members].sum() <= capacity for members in packs)


@pytest.mark.parametrize("lengths", [[0, 3], [9], [-1]])
def test_lengths_that_cannot_be_packed_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.8, got"):
        pack_shuffled(np.array(lengths), 8)


def test_time_is_linear():
    lengths = chats(np.random.default_rng(0))
    times = []
    for repeat in (1, 8):
        started = time.process_time()
        pack_shuffled(np.tile(lengths, repeat), 4096)
        times.append(time.process_time() - started)
    assert times[1] < 16 * times[0]


@pytest.mark.parametrize(("least", "spread"), [(512, "uniform"), (300, "uniform"), (1, "lognormal")])
def test_no_document_waits_for_ever_in_packs_of_one_or_two(least, spread):
    rng = np.random.default_rng(0)
    if spread == "uniform":
        lengths = rng.integers(least, 1025, 6000)
    else:
        lengths = np.minimum(1024, rng.lognormal(6.8, 0.8, 6000).astype(int) + least)
    _, left = pack_ahead(lengths, 1024)
    assert 490 < left.size < 500
    assert left.min() > 4500


def test_no_document_is_paired_with_itself():
    queue = _Queue(np.array([50, 41, 58]), 100)
    queue._refill()
    assert queue._window[queue._first_of_pair(fitting=3, room=100)] >> 40 == 41  # with 58, and not 50 twice
