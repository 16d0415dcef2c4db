import numpy as np
import pytest

from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture, Shares


def epochs_of(lengths, capacity=256, shares=None, seed=1):
    return Epochs(np.asarray(lengths), capacity, Mixture.of([lengths], shares, seed=seed or 0), seed=seed)


@pytest.mark.parametrize("num", [1, 2, 30, 400, 6000])
def test_every_epoch_has_the_same_documents_in_as_many_packs(num):
    lengths = np.random.default_rng(num).integers(1, 200, num)
    epochs = epochs_of(lengths)
    for epoch in range(6):
        packs = epochs(epoch)
        assert len(packs) == epochs.num_packs
        assert sorted(packs.members.tolist()) == list(range(num))
        assert all(0 < lengths[members].sum() <= 256 for members in packs)


def test_epochs_are_packed_anew_and_come_back():
    epochs = epochs_of(np.random.default_rng(0).integers(1, 100, 300))
    first, second, again = epochs(0), epochs(1), epochs(0)
    assert np.array_equal(first.members, again.members)
    assert np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.members, second.members)


def test_packs_are_a_function_of_the_seed():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    one, again, other = (epochs_of(lengths, seed=seed)(3) for seed in (7, 7, 8))
    assert np.array_equal(one.members, again.members)
    assert not np.array_equal(one.members, other.members)


def test_without_a_seed_every_epoch_is_the_first():
    epochs = epochs_of(np.random.default_rng(0).integers(1, 100, 300), seed=None)
    assert np.array_equal(epochs(0).members, epochs(4).members)


def test_an_order_that_needs_more_packs_gives_way_to_the_first(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    epochs = epochs_of(lengths)
    epochs.num_packs -= 1
    monkeypatch.setattr("deltatune.data.epochs._in_number", lambda packs, number: packs)
    assert np.array_equal(epochs(1).members, epochs._first.members)


def test_a_part_of_a_source_is_packed_in_each_epoch():
    lengths = np.full(100, 10)
    mixture = Mixture((100,), (30,), [lengths], seed=0)
    epochs = Epochs(lengths, 50, mixture, seed=0)
    seen = [epochs(epoch).members for epoch in range(4)]
    assert [members.size for members in seen] == [30] * 4
    assert epochs.num_packs == 7
    assert len(set(np.concatenate(seen[:3]).tolist())) == 90


@pytest.mark.parametrize("sizes", [(300, 3000), (3000, 6000)])
def test_epochs_that_take_a_part_of_a_source_are_never_the_first_again(sizes):
    rng = np.random.default_rng(0)
    sources = [np.clip(rng.lognormal(3, 1, size), 1, 256).astype(np.int32) for size in sizes]
    lengths = np.concatenate(sources)
    epochs = Epochs(lengths, 256, Mixture.of(sources, Shares([2.0, 1.0]), seed=1), seed=1)
    counts = np.zeros(lengths.size, dtype=int)
    for epoch in range(12):
        packs = epochs(epoch)
        assert len(packs) == epochs.num_packs
        counts += np.bincount(packs.members, minlength=lengths.size)
    assert set(counts[: sizes[0]]) == {12}
    assert np.ptp(counts[sizes[0] :]) == 1
