"""The same documents through the packed and compiled model and through the stock one, padded."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.training.batches import PACK_COUNTS, PACK_ORIGINS, CountingCollator, PackCounts
from deltatune.training.metrics import MeterReading

__all__ = ["compare", "padded_batch", "shuffled_batches"]

Batch = dict[str, Any]


def compare(
    prepared: torch.nn.Module,
    stock: torch.nn.Module,
    packs: Sequence[Sequence[Sample]],
    *,
    tokens_per_batch: int,
    pad_token_id: int,
    learning_rate: float,
    warm_up: int = 3,
) -> tuple[MeterReading, MeterReading]:
    """Trains both models on the same documents, a step of each in turn: what each did, in which time.

    The prepared model gets them pack by pack. The stock model gets them in shuffled order, as many batches as there
    are packs, each padded to its longest document: what a collator that pads makes of them. Both have an AdamW of
    their own with equal settings. The first ``warm_up`` packs compile and warm caches and are not counted; their
    documents stay among themselves.
    """
    collate = CountingCollator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id)
    mixed = [*shuffled_batches(packs[:warm_up]), *shuffled_batches(packs[warm_up:])]
    first, second = (
        torch.optim.AdamW(model.train().parameters(), lr=learning_rate, fused=True) for model in (prepared, stock)
    )
    packed = padded = MeterReading(PackCounts(), 0.0, 0)
    for number, (pack, rows) in enumerate(zip(packs, mixed, strict=True)):
        if number == warm_up:
            packed = padded = MeterReading(PackCounts(), 0.0, 0)
        packed = _step(packed, prepared, first, collate([pack]))
        padded = _step(padded, stock, second, padded_batch(rows, pad_token_id))
    return packed, padded


def _step(before: MeterReading, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> MeterReading:
    """Trains on a batch and counts it: forward, backward and optimizer."""
    counts = batch.pop(PACK_COUNTS)
    batch.pop(PACK_ORIGINS, None)
    began = time.perf_counter()
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return MeterReading(before.counts + counts, before.seconds + time.perf_counter() - began, before.steps + 1)


def shuffled_batches(packs: Sequence[Sequence[Sample]], *, seed: int = 0) -> list[Sequence[Sample]]:
    """The documents of these packs in random order, in as many batches, of equal numbers of documents within one."""
    documents = [sample for pack in packs for sample in pack]
    random.Random(seed).shuffle(documents)
    return [documents[number :: len(packs)] for number in range(len(packs))]


def padded_batch(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """One sample a row ``[B, T]``, padded on the right to the longest, with a 0/1 mask; padding never trains."""
    ids = [torch.from_numpy(sample.input_ids) for sample in samples]
    labels = [torch.from_numpy(sample.labels) for sample in samples]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    trained, tokens = sum(sample.num_trained for sample in samples), sum(map(len, samples))
    return {
        "input_ids": input_ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        PACK_COUNTS: PackCounts(trained=trained, tokens=tokens, capacity=input_ids.numel()),
    }
