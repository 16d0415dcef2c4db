"""Ranks that compute together get packs of like cost, and every pack still comes once, at a random time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture
from deltatune.parallel.mesh import Mesh
from deltatune.training.batches import PackOrder
from deltatune.training.rounds import WINDOW, steps_of_like_cost

COSTS = np.random.default_rng(0).lognormal(0, 1, 203)


def dealt(per_step: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(COSTS.size, generator=generator).numpy()
    return order, steps_of_like_cost(order, COSTS, per_step, generator)


@pytest.mark.parametrize("per_step", [1, 2, 8, 25, 250])
def test_every_pack_comes_once_within_its_window(per_step: int) -> None:
    before, after = dealt(per_step)
    size = WINDOW * per_step
    whole = COSTS.size // per_step * per_step
    for start in range(0, whole, size):
        window = slice(start, min(start + size, whole))
        assert sorted(before[window]) == sorted(after[window])
    assert before[whole:].tolist() == after[whole:].tolist()


def test_a_step_holds_packs_of_like_cost() -> None:
    before, after = dealt(8)
    busy = [COSTS[order[:200]].reshape(-1, 8) for order in (before, after)]
    shares = [steps.mean() / steps.max(1).mean() for steps in busy]
    assert shares[0] < 0.5
    assert shares[1] > 0.75


def test_no_step_is_early_or_late_for_its_cost() -> None:
    means = np.zeros(WINDOW)
    for seed in range(400):
        means += COSTS[dealt(4, seed=seed)[1][: 4 * WINDOW]].reshape(WINDOW, 4).mean(1)
    # sorted steps would differ by a factor of about ten
    assert means.max() / means.min() < 1.25


@pytest.mark.parametrize("per_step", [4, 6])
def test_a_step_is_the_same_however_many_ranks_share_it(per_step: int) -> None:
    def steps(ranks: int) -> list[list[int]]:
        orders = [
            PackOrder(203, seed=5, mesh=Mesh(ranks, rank), per_step=per_step, costs=lambda _: COSTS)
            for rank in range(ranks)
        ]
        for order in orders:
            order.set_epoch(2)
        rounds = [[pack for batch in batches for pack in batch] for batches in zip(*orders, strict=True)]
        packs = [pack for one in rounds for pack in one]
        return [packs[start : start + per_step] for start in range(0, len(packs), per_step)]

    assert steps(1) == steps(2)
    assert sorted(pack for step in steps(1) for pack in step) == list(range(203))
    assert steps(1) != [step.tolist() for step in np.array_split(np.arange(203), 203 // per_step)]


def test_packs_in_their_own_order_stay_in_it() -> None:
    assert list(PackOrder(5, per_step=2, costs=lambda _: COSTS[:5])) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("ranks", [8, 64])
def test_ranks_wait_less_on_long_tailed_documents(ranks: int) -> None:
    # seconds of Qwen3.5-2B by FLOPs: 2.06 x 2 x 1.9e9 a token at 700 TFLOP/s and 18 delta rules; for a squared length
    # 3.5 x 2 x 6 layers x 8 heads x 256 at 260 TFLOP/s
    capacity = 32768
    matrices, attention = capacity * 1.38e-5, 3.3e-10
    lengths = np.clip(np.random.default_rng(1).lognormal(6.5, 1.2, 40_000), 16, capacity).astype(int)
    epochs = Epochs(lengths, capacity, Mixture.of([lengths]), seed=0)
    packs = epochs(0)
    squares = np.add.reduceat(lengths[packs.members] ** 2, packs.starts[:-1])

    def busy(costs: np.ndarray | None) -> float:
        order = PackOrder(
            epochs.num_packs, seed=0, drop_last=True, per_step=ranks, costs=None if costs is None else lambda _: costs
        )
        index = [int(batch[0]) for batch in order]
        steps = matrices + attention * squares[index[: len(index) // ranks * ranks]].reshape(-1, ranks)
        return float(steps.mean() / steps.max(1).mean())

    assert busy(squares) > 1.1 * busy(None)
    assert busy(squares) > 0.93
