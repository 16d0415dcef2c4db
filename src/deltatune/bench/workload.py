"""The packed batch that everything trains on: documents of drawn lengths, fresh for every step."""

# T tokens of a batch

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deltatune.errors import UserError
from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import Sample
from deltatune.packing.sequences import Sequences
from deltatune.training.batches import PackCounts

__all__ = ["LONGEST", "SHORTEST", "Batch", "Workload", "draw_lengths"]

SHORTEST: Final = 64
LONGEST: Final = 2048
_PAD: Final = 0


def draw_lengths(tokens: int, *, shortest: int = SHORTEST, longest: int = LONGEST, seed: int = 0) -> list[int]:
    """Log-uniform lengths that fill a batch to its last token; one document where ``longest`` reaches ``tokens``.

    Raises:
        UserError: bounds that are not ``1 <= shortest <= longest``, or fewer tokens than ``shortest``.
    """
    if not 1 <= shortest <= longest or tokens < shortest:
        raise UserError(f"documents of {shortest} to {longest} tokens cannot fill a batch of {tokens}")
    if shortest >= tokens:
        return [tokens]
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = tokens
    while left:
        drawn = round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))
        drawn = left if left - drawn < shortest else drawn
        if drawn > longest and lengths:
            # what is left is too long for one document and too short for two: it ends at half
            drawn = left // 2
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


@dataclass(frozen=True)
class Batch:
    """One collated pack.

    Attributes:
        tensors: what the collator made, ``sequences`` included.
        counts: of its documents and targets.
    """

    tensors: dict[str, Any]
    counts: PackCounts

    def to(self, device: torch.device) -> Batch:
        """A copy on a device, which is not waited for; the CPU copies of boundaries stay."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor | Sequences) else value
            for name, value in self.tensors.items()
        }
        return Batch(moved, self.counts)

    @property
    def sequences(self) -> Sequences:
        """The boundaries."""
        found = self.tensors["sequences"]
        assert isinstance(found, Sequences)
        return found

    def only(self, document: int) -> Batch:
        """The same pack with targets in one document alone."""
        start, end = (int(self.sequences.cu_seqlens_cpu[document + i]) for i in range(2))
        labels = torch.full_like(self.tensors["labels"], -100)
        labels[:, start:end] = self.tensors["labels"][:, start:end]
        counts = PackCounts(end - start - 1, end - start, self.counts.capacity, (end - start) ** 2, 1)
        return Batch({**self.tensors, "labels": labels}, counts)

    def alone(self, document: int) -> Batch:
        """One document as a batch of its own."""
        start, end = (int(self.sequences.cu_seqlens_cpu[document + i]) for i in range(2))
        sample = Sample(
            self.tensors["input_ids"][0, start:end].cpu().numpy(), self.tensors["input_ids"][0, start:end].cpu().numpy()
        )
        return _collated([sample], end - start).to(self.tensors["input_ids"].device)


@dataclass(frozen=True)
class Workload:
    """Batches of one shape: the same lengths in another order and other tokens for each.

    The work is the same in every step, while no step's boundaries are the last one's.
    """

    lengths: tuple[int, ...]
    vocab_size: int
    seed: int = 0
    pin: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def batch(self, number: int) -> Batch:
        """The batch of a step, on the CPU; number 0 has the lengths as they are given."""
        generator = np.random.default_rng((self.seed, number))
        order: Sequence[int] = self.lengths
        if number:
            order = [self.lengths[i] for i in generator.permutation(len(self.lengths))]
        samples = []
        for length in order:
            ids = generator.integers(1, self.vocab_size, length)
            samples.append(Sample(ids, ids))
        collated = _collated(samples, self.tokens)
        return _pinned(collated) if self.pin else collated

    def batches(self, start: int = 1) -> Iterator[Batch]:
        """One after the other, without end."""
        while True:
            yield self.batch(start)
            start += 1


def _collated(samples: list[Sample], tokens: int) -> Batch:
    tensors = PackedCollator(tokens_per_batch=tokens, pad_token_id=_PAD, allow_unlabelled=True)(samples)
    lengths = [len(sample) for sample in samples]
    trained = sum(length - 1 for length in lengths)
    return Batch(tensors, PackCounts(trained, sum(lengths), tokens, sum(n * n for n in lengths), 1))


def _pinned(batch: Batch) -> Batch:
    pinned = {
        name: value.pin_memory() if isinstance(value, Tensor | Sequences) else value
        for name, value in batch.tensors.items()
    }
    return Batch(pinned, batch.counts)
