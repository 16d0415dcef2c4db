"""Packs, arguments and trainers for small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_model

from deltatune import prepare
from deltatune.config.schema import TrainingSection
from deltatune.data.sample import IGNORE_INDEX, Sample
from deltatune.training.arguments import training_arguments
from deltatune.training.trainer import PackedTrainer

TOKENS = 48


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Packs:
    """Packs of known content: documents of varying length, a varying share of their tokens trained."""

    def __init__(self, count: int, *, tokens: int = TOKENS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.packs = [self._pack(rng, tokens, trained) for trained in np.linspace(0.15, 1.0, count)]
        self.seen: list[int] = []

    @staticmethod
    def _pack(rng: np.random.Generator, tokens: int, trained: float) -> list[Sample]:
        samples: list[Sample] = []
        room = int(rng.integers(tokens * 2 // 3, tokens + 1))
        while room >= 3:
            length = min(room, int(rng.integers(3, 20)))
            ids = rng.integers(1, VOCAB, length)
            labels = np.where(rng.random(length) < trained, ids, IGNORE_INDEX)
            labels[-1] = ids[-1]
            samples.append(Sample(ids, labels))
            room -= length
        return samples

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Sample]:
        self.seen.append(index)
        return self.packs[index]

    @property
    def num_trained(self) -> int:
        return sum(sample.num_trained for pack in self.packs for sample in pack)


def make_trainer(
    output_dir: Path,
    *,
    model: Any = None,
    packs: Packs | None = None,
    eval_packs: Any = None,
    tokens: int = TOKENS,
    packs_per_batch: int = 1,
    **training: Any,
) -> PackedTrainer:
    values = {"output_dir": str(output_dir), "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **training}
    arguments = training_arguments(TrainingSection(**values))
    arguments.per_device_train_batch_size = packs_per_batch
    if model is None:
        model = tiny_model("qwen3_5")
        prepare(model)
    return PackedTrainer(
        model,
        arguments,
        train_dataset=packs if packs is not None else Packs(4),
        eval_dataset=eval_packs,
        tokens_per_batch=tokens,
        pad_token_id=0,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
