import subprocess
import sys
import time

import numpy as np
import pytest

from deltatune.packing.bins import pack


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, one document at a time."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[index]]
        if not fitting:
            bins.append([])
            room.append(capacity)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: room[b])
        bins[best].append(index)
        room[best] -= lengths[index]
    return bins


def log_normal(num: int, capacity: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(6, 0.8, num), 1, capacity).astype(np.int64)


def assert_exact(packs: list[list[int]], lengths: np.ndarray, capacity: int) -> None:
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(members for members in packs)
    assert max(int(lengths[members].sum()) for members in packs) <= capacity


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 1000, 65537])
@pytest.mark.parametrize("num", [1, 3, 50, 400])
def test_places_as_if_one_by_one(num, capacity):
    lengths = np.random.default_rng(num).integers(1, max(2, capacity // 2 + 1), num)
    packs = pack(lengths, capacity)
    assert_exact(packs, lengths, capacity)
    expected = one_by_one(lengths.tolist(), capacity)
    # ties between equally full bins may fall either way, so compare what the bins hold, not which documents
    assert sorted(int(lengths[p].sum()) for p in packs) == sorted(int(lengths[p].sum()) for p in expected)


def test_full_on_log_normal_lengths_within_seconds():
    lengths = log_normal(100_000, 8192)
    start = time.perf_counter()
    packs = pack(lengths, 8192)
    seconds = time.perf_counter() - start
    assert_exact(packs, lengths, 8192)
    assert lengths.sum() / (len(packs) * 8192) >= 0.995
    assert seconds < 2


def test_a_million_documents_take_little_more_than_ten_times_as_long():
    lengths = log_normal(1_000_000, 8192)
    start = time.perf_counter()
    packs = pack(lengths, 8192)
    seconds = time.perf_counter() - start
    assert_exact(packs, lengths, 8192)
    assert seconds < 15


def test_same_input_gives_same_packs_with_ascending_members():
    lengths = log_normal(5000, 2048)
    first, second = pack(lengths, 2048), pack(lengths.tolist(), 2048)
    assert first == second
    assert all(members == sorted(members) for members in first)
    assert all(isinstance(index, int) for members in first for index in members)


def test_every_document_of_full_capacity_is_a_bin():
    assert sorted(pack([8, 8, 8], 8)) == [[0], [1], [2]]


@pytest.mark.parametrize("lengths", [[0, 0], [0, 3, 0, 5], [5, 0]])
def test_empty_documents_are_placed(lengths):
    assert_exact(pack(lengths, 5), np.array(lengths), 5)


def test_nothing_to_pack_gives_no_bins():
    assert pack([], 16) == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 9], 8, "document 1 holds 9 tokens, more than the capacity of 8"),
        ([3, -2], 8, "got -2 at index 1"),
        ([3], 0, "capacity must be at least 1 token, got 0"),
        ([3], -5, "got -5"),
        ([1.5], 8, "integers, got float64"),
        ([[1], [2]], 8, r"shape \(2, 1\)"),
    ],
)
def test_bad_lengths_are_named(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, capacity)


def test_packing_imports_no_torch():
    code = "import sys; from deltatune.packing.bins import pack; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
