import numpy as np
import pytest

from deltatune.data.mixture import Mixture, Shares

LONG, SHORT = np.full(10, 40), np.full(100, 4)


@pytest.mark.parametrize(
    ("shares", "quotas"),
    [
        (Shares(), (10, 100)),
        (Shares(repeats=[3, 1]), (30, 100)),
        (Shares(weights=[1, 1]), (10, 100)),  # 400 tokens each
        (Shares(weights=[1, 1], by="documents"), (10, 10)),
        (Shares(weights=[3, 1]), (10, 33)),  # 133 tokens of 400
        (Shares(weights=[0.1, 0.9], by="documents"), (10, 90)),
        (Shares(weights=[1, 1], repeats=[2, 1], by="documents"), (20, 20)),
        (Shares(weights=[1, 1000]), (1, 100)),  # never none
    ],
)
def test_an_epoch_is_as_long_as_the_weights_allow(shares, quotas):
    assert Mixture.of([LONG, SHORT], shares).quotas == quotas


def test_a_repeated_document_is_drawn_as_often():
    drawn = Mixture.of([np.ones(3), np.ones(2)], Shares(repeats=[2, 1])).draw(5)
    assert sorted(drawn.tolist()) == [0, 0, 1, 1, 2, 2, 3, 4]


def test_over_the_epochs_every_document_is_drawn_equally_often():
    mixture = Mixture.of([np.ones(4), np.ones(10)], Shares(weights=[1, 1], by="documents"), seed=3)
    assert mixture.quotas == (4, 4)
    counts = np.zeros(14, dtype=int)
    for epoch in range(5):
        drawn = mixture.draw(epoch)
        assert drawn.size == 8
        counts += np.bincount(drawn, minlength=14)
    assert counts.tolist() == [5] * 4 + [2] * 10


@pytest.mark.parametrize("share", [0.07, 0.5, 1.3])
def test_epochs_of_a_part_hold_as_many_tokens_whatever_the_lengths(share):
    long = np.random.default_rng(0).lognormal(5, 1.2, 400).astype(int) + 1
    mixture = Mixture((400,), (int(share * long.size),), [long], seed=0)
    drawn = [mixture.draw(epoch) for epoch in range(40)]
    tokens = np.array([long[documents].sum() for documents in drawn])
    due = long.sum() * mixture.quotas[0] / long.size
    assert abs(tokens - due).max() < long.max()
    seen = np.bincount(np.concatenate(drawn), minlength=long.size)
    assert seen.max() - seen.min() <= 1


def test_epochs_have_equally_many_tokens():
    lengths = [np.full(5, 100), np.random.default_rng(0).integers(1, 90, 700)]
    mixture = Mixture.of(lengths, Shares(weights=[1, 3]))
    drawn = [mixture.draw(epoch) for epoch in range(60)]
    tokens = [int(lengths[1][part[part >= 5] - 5].sum()) for part in drawn]
    assert all(abs(count - 1500) < 2 * 90 for count in tokens)
    counts = np.bincount(np.concatenate(drawn), minlength=705)
    assert set(counts[:5]) == {60}
    assert np.ptp(counts[5:]) == 1


def test_draws_follow_the_seed():
    lengths, shares = [np.ones(50), np.ones(400)], Shares(weights=[1, 1], by="documents")
    one, again, other = (Mixture.of(lengths, shares, seed=seed).draw(2) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_sources_are_drawn_apart():
    drawn = Mixture((50, 50), (20, 20), [np.ones(50, dtype=int)] * 2, seed=0).draw(0)
    assert set(drawn[drawn < 50]) != set(drawn[drawn >= 50] - 50)


def test_an_empty_source_is_passed_over_without_weights_and_refused_with_them():
    lengths = [np.ones(2), np.ones(0), np.ones(1)]
    assert Mixture.of(lengths).draw(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="source 1 has a weight and no documents"):
        Mixture.of(lengths, Shares(weights=[1, 1, 1]))
