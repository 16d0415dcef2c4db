"""Training on packs whose ends are chosen learns no less than training on packs of plain shuffled documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from deltatune import prepare
from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture
from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import Sample
from tiny import VOCAB, tiny_model

CAPACITY, STEPS = 256, 25
HALF = VOCAB // 2

Packs = Iterable[np.ndarray]


def documents(seed: int, count: int) -> list[Sample]:
    """Four in five are short and repeat a pair of tokens; the others are long and count upwards by three."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        if rng.random() < 0.8:
            ids = np.resize(rng.integers(1, HALF, 2), int(rng.integers(8, 20)))
        else:
            ids = HALF + (int(rng.integers(HALF)) + 3 * np.arange(int(rng.integers(40, 120)))) % HALF
        made.append(Sample(ids.astype(np.int64), ids.astype(np.int64)))
    return made


def as_they_come(lengths: np.ndarray, seed: int) -> Callable[[int], Packs]:
    """Shuffled documents in order, a new pack wherever the next one does not fit."""

    def epoch(number: int) -> Packs:
        members: list[int] = []
        for index in np.random.default_rng((seed, number)).permutation(lengths.size):
            if lengths[members].sum() + lengths[index] > CAPACITY:
                yield np.array(members)
                members = []
            members.append(index)
        yield np.array(members)

    return epoch


def chosen(lengths: np.ndarray, seed: int) -> Callable[[int], Packs]:
    epochs = Epochs(lengths, CAPACITY, Mixture.of([lengths]), seed=seed)
    return lambda number: (epochs(number)[index] for index in np.random.default_rng(seed).permutation(epochs.num_packs))


def held_out_loss(make: Callable[[np.ndarray, int], Callable[[int], Packs]], seed: int) -> float:
    """The loss after some steps on packs of this kind."""
    torch.manual_seed(seed)
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = PackedCollator(tokens_per_batch=CAPACITY, pad_token_id=0)

    def batch(samples: list[Sample]) -> dict[str, object]:
        made = collate(samples)
        return {name: made[name] for name in ("input_ids", "labels", "position_ids", "sequences")}

    train = documents(seed, 400)
    epochs = make(np.array([len(sample) for sample in train]), seed)
    packs = (pack for number in range(STEPS) for pack in epochs(number))
    for _, pack in zip(range(STEPS), packs, strict=False):
        model(**batch([train[index] for index in pack])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = documents(999, 50)
    with torch.no_grad():
        losses = [model(**batch([sample])).loss.item() for sample in held]
    return float(np.average(losses, weights=[len(sample) - 1 for sample in held]))


def test_chosen_ends_of_packs_cost_nothing_of_what_is_learned() -> None:
    by_kind = [np.mean([held_out_loss(make, seed) for seed in range(3)]) for make in (as_they_come, chosen)]
    assert by_kind[0] < np.log(VOCAB) - 0.5, "something is learned"
    assert by_kind[1] < by_kind[0]
