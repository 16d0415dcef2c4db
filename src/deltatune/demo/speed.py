"""The same documents, step by step, through the packed and compiled model and through the stock one, padded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from deltatune.data.collate import PackedCollator
from deltatune.data.sample import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Timing", "compare", "padded_batch"]

Batch = dict[str, Any]


@dataclass
class Timing:
    """Training steps of one way to lay out and run the same documents.

    Attributes:
        trained: trained tokens of the timed steps, the same for both ways.
        tokens: their document tokens, the same for both ways.
        slots: tokens that went through the model, padding included.
        seconds: of each timed step: forward, backward, optimizer.
        losses: of every step, the untimed ones first.
    """

    trained: int = 0
    tokens: int = 0
    slots: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def trained_per_second(self) -> float:
        """Trained tokens per second."""
        return self.trained / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Document tokens per second, padding not counted."""
        return self.tokens / sum(self.seconds)

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
    """Trains both models on the same documents in the same order, a step of each in turn.

    A step takes the documents of one pack: the prepared model gets them as that pack, the stock model as one batch of
    rows padded to the longest. Both have an AdamW of their own with equal settings, start from equal weights, and so
    should show equal losses. The first ``warm_up`` packs compile and warm caches and are not timed.

    Returns:
        the prepared model's timing and the stock model's.
    """
    collate = PackedCollator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id)
    sides: list[tuple[torch.nn.Module, Optimizer, Callable[[Sequence[Sample]], Batch], Timing]] = []
    for model, batch_of in ((prepared, collate), (stock, lambda pack: padded_batch(pack, pad_token_id))):
        model.train()
        sides.append((model, torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True), batch_of, Timing()))
    for number, pack in enumerate(packs):
        for model, optimizer, batch_of, timing in sides:
            batch = batch_of(pack)
            began = time.perf_counter()
            loss = _step(model, optimizer, batch)
            seconds = time.perf_counter() - began
            timing.losses.append(loss)
            if number >= warm_up:
                timing.seconds.append(seconds)
                timing.trained += sum(sample.num_trained for sample in pack)
                timing.tokens += sum(map(len, pack))
                timing.slots += batch["input_ids"].numel()
    return sides[0][3], sides[1][3]


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


def _step(model: torch.nn.Module, optimizer: Optimizer, batch: Batch) -> float:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
