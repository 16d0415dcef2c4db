"""The same documents through the packed and compiled model and through the stock one, padded."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

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
        seconds: of forward, backward and optimizer.
    """

    trained: int = 0
    tokens: int = 0
    slots: int = 0
    seconds: float = 0.0

    @property
    def rates(self) -> tuple[float, float, float]:
        """Trained tokens, document tokens and slots per second."""
        return self.trained / self.seconds, self.tokens / self.seconds, self.slots / self.seconds

    def step(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: Sequence[Sample], batch: Batch
    ) -> None:
        """Trains on a batch, and counts it."""
        began = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.seconds += time.perf_counter() - began
        self.trained += sum(sample.num_trained for sample in samples)
        self.tokens += sum(map(len, samples))
        self.slots += batch["input_ids"].numel()


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
    their own with equal settings. The first ``warm_up`` packs compile and warm caches and are not counted; their
    documents stay among themselves.

    Returns:
        the prepared model's timing and the stock model's.
    """
    collate = PackedCollator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id)
    mixed = [*shuffled_batches(packs[:warm_up]), *shuffled_batches(packs[warm_up:])]
    first, second = (
        torch.optim.AdamW(model.train().parameters(), lr=learning_rate, fused=True) for model in (prepared, stock)
    )
    packed, padded = Timing(), Timing()
    for number, (pack, rows) in enumerate(zip(packs, mixed, strict=True)):
        if number == warm_up:
            packed, padded = Timing(), Timing()
        packed.step(prepared, first, pack, collate(pack))
        padded.step(stock, second, rows, padded_batch(rows, pad_token_id))
    return packed, padded


def shuffled_batches(packs: Sequence[Sequence[Sample]], *, seed: int = 0) -> list[Sequence[Sample]]:
    """The documents of these packs in random order, in as many batches, of equal numbers of documents within one."""
    documents = [sample for pack in packs for sample in pack]
    random.Random(seed).shuffle(documents)
    return [documents[number :: len(packs)] for number in range(len(packs))]


def padded_batch(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """One sample a row ``[B, T]``, padded on the right to the longest, with a 0/1 mask; padding never trains."""
    ids = [torch.from_numpy(sample.input_ids) for sample in samples]
    labels = [torch.from_numpy(sample.labels) for sample in samples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
