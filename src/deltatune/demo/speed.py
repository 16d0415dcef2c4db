"""The same documents through the packed and compiled model and through the stock one, padded."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import IGNORE_INDEX, Sample

__all__ = ["Timing", "compare", "padded_batch", "shuffled_batches"]

Batch = dict[str, Any]


@dataclass
class Timing:
    """Training steps of one way to lay out and run the same documents.

    Attributes:
        trained: trained tokens of the timed steps, the same for both ways.
        tokens: their document tokens, the same for both ways.
        slots: tokens that went through the model, padding included.
        seconds: of each timed step: forward, backward, optimizer.
    """

    trained: int = 0
    tokens: int = 0
    slots: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def trained_per_second(self) -> float:
        """Trained tokens per second."""
        return self.trained / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Document tokens per second, padding not counted."""
        return self.tokens / sum(self.seconds)

    @property
    def slots_per_second(self) -> float:
        """Slots per second, padding counted: the speed of the model apart from what packing saves."""
        return self.slots / sum(self.seconds)

    @property
    def fill(self) -> float:
        """The share of slots that held a document."""
        return self.tokens / self.slots

    @property
    def median_ms(self) -> float:
        """The median step."""
        return 1000 * statistics.median(self.seconds)


def compare(
    prepared: torch.nn.Module,
    stock: torch.nn.Module,
    packs: Sequence[Sequence[Sample]],
    *,
    tokens_per_batch: int,
    pad_token_id: int,
    learning_rate: float,
    warm_up: int = 3,
) -> tuple[Timing, Timing]:
    """Trains both models on the same documents, a step of each in turn.

    The prepared model gets them pack by pack. The stock model gets them in shuffled order, as many batches as there
    are packs, each padded to its longest document: what a collator that pads makes of them. Both have an AdamW of
    their own with equal settings. The first ``warm_up`` packs compile and warm caches and are not timed; their
    documents stay among themselves.

    Returns:
        the prepared model's timing and the stock model's.
    """
    collate = PackedCollator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id)
    mixed = [*shuffled_batches(packs[:warm_up]), *shuffled_batches(packs[warm_up:])]
    sides = (
        _Side(prepared, learning_rate, list(packs), collate),
        _Side(stock, learning_rate, mixed, lambda batch: padded_batch(batch, pad_token_id)),
    )
    for number in range(len(packs)):
        for side in sides:
            side.step(number, timed=number >= warm_up)
    return sides[0].timing, sides[1].timing


class _Side:
    """A model, its optimizer, and how it takes its documents."""

    def __init__(
        self,
        model: torch.nn.Module,
        learning_rate: float,
        batches: list[Sequence[Sample]],
        collate: Callable[[Sequence[Sample]], Batch],
    ) -> None:
        self.timing = Timing()
        self._model = model.train()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
        self._batches = batches
        self._collate = collate

    def step(self, number: int, *, timed: bool) -> None:
        samples = self._batches[number]
        batch = self._collate(samples)
        began = time.perf_counter()
        self._model(**batch, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        seconds = time.perf_counter() - began
        if timed:
            self.timing.seconds.append(seconds)
            self.timing.trained += sum(sample.num_trained for sample in samples)
            self.timing.tokens += sum(map(len, samples))
            self.timing.slots += batch["input_ids"].numel()


def shuffled_batches(packs: Sequence[Sequence[Sample]], *, seed: int = 0) -> list[Sequence[Sample]]:
    """The documents of these packs in random order, in as many batches, of equal numbers of documents within one."""
    documents = [sample for pack in packs for sample in pack]
    random.Random(seed).shuffle(documents)
    return [documents[number :: len(packs)] for number in range(len(packs))]


def padded_batch(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """One sample a row ``[B, T]``, padded on the right to the longest, with a 0/1 mask; padding never trains."""
    shape = len(samples), max(map(len, samples))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        batch["input_ids"][row, : len(sample)] = torch.from_numpy(sample.input_ids)
        batch["labels"][row, : len(sample)] = torch.from_numpy(sample.labels)
        batch["attention_mask"][row, : len(sample)] = 1
    return batch
