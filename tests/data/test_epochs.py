import numpy as np
import pytest

from deltatune.data.epochs import Epochs, _in_number
from deltatune.data.mixture import Mixture, Shares
from deltatune.packing.shuffled import Packs


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


def lognormal(num, seed):
    return np.minimum(1024, np.random.default_rng(seed).lognormal(4.5, 1.1, num).astype(int) + 1)


def test_epochs_of_a_mixture_see_the_documents_that_are_drawn():
    sources = [lognormal(900, 0), lognormal(300, 1)]
    mixture = Mixture.of(sources, Shares(weights=[1, 1]), seed=3)
    epochs = Epochs(np.concatenate(sources), 1024, mixture, seed=3)
    for epoch in range(8):
        packs = epochs(epoch)
        assert len(packs) == epochs.num_packs
        assert sorted(packs.members) == sorted(mixture.draw(epoch))


def test_a_drawn_part_that_needs_more_packs_leaves_the_emptiest_out():
    lengths = lognormal(900, 0)
    epochs = Epochs(lengths, 1024, Mixture((900,), (400,), [lengths], seed=0), seed=0)
    last = epochs._pack(3, 7)  # the last order that is tried
    epochs.num_packs = min(len(epochs._pack(3, attempt)) for attempt in range(8)) - 2
    packs = epochs(3)
    assert len(packs) == epochs.num_packs
    fill = sorted((lengths[members].sum() for members in last), reverse=True)
    assert sorted((lengths[members].sum() for members in packs), reverse=True) == fill[: len(packs)]
    assert np.unique(packs.members).size == packs.members.size
    assert np.isin(packs.members, epochs._mixture.draw(3)).all()


@pytest.mark.parametrize(("length", "packs"), [(40, 4002), (60, 8000)])
def test_one_pack_in_2000_is_spare_where_documents_allow(length, packs):
    assert epochs_of(np.full(8000, length), 100).num_packs == packs


def test_packs_are_cut_until_each_holds_one_document():
    packs = _in_number(Packs(np.arange(4), np.array([0, 3, 4])), 4)
    assert packs.starts.tolist() == [0, 1, 2, 3, 4]


def test_an_epoch_of_fewer_documents_than_packs_sees_some_again():
    lengths = np.array([100] * 4 + [51] * 8)  # two of which fit no pack
    epochs = Epochs(lengths, 100, Mixture((12,), (6,), [lengths], seed=0), seed=0)
    drawn = [epochs._mixture.draw(epoch) for epoch in range(4)]
    assert min(documents.size for documents in drawn) < epochs.num_packs
    for epoch, documents in enumerate(drawn):
        packs = epochs(epoch)
        assert [members.size for members in packs] == [1] * epochs.num_packs
        assert set(packs.members) <= set(documents)


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
