"""How often the documents of each source are seen in an epoch, and which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mixture", "Shares", "WeightBy"]

WeightBy = Literal["tokens", "documents"]

Indices = NDArray[np.integer]


@dataclass(frozen=True)
class Shares:
    """What an epoch should take of each source."""

    weights: Sequence[float] | None = None  # shares in any unit, > 0; None takes every source whole
    repeats: Sequence[int] | None = None  # how often a document may be seen in an epoch, and is without weights
    by: WeightBy = "tokens"  # whether weights are shares of the tokens or of the documents


@dataclass(frozen=True)
class Mixture:
    """Draws every epoch's documents from the sources.

    A source's documents come in one shuffled order after another, and an epoch takes the next part: as many tokens as
    ``quotas[s]`` of its documents have on average, so that all epochs are equally long up to a document, and can have
    equally many packs. Over the epochs every document is seen equally often, up to one, however small its source's
    share is.
    """

    sizes: tuple[int, ...]  # documents of each source
    quotas: tuple[int, ...]  # documents that an epoch takes of it, on average
    lengths: Sequence[NDArray[np.integer]]  # tokens of each document, by source
    seed: int

    @classmethod
    def of(cls, lengths: Sequence[NDArray[np.integer]], shares: Shares | None = None, *, seed: int = 0) -> Mixture:
        """The mixture of sources with documents of these lengths.

        With weights an epoch is as long as it can be without any source giving more than all of its documents,
        ``repeats`` times; so one source is seen whole and of the others a part.

        Raises:
            ValueError: a source with a weight and no documents.
        """
        shares = shares or Shares()
        sizes = tuple(len(source) for source in lengths)
        most = [size * repeat for size, repeat in zip(sizes, shares.repeats or [1] * len(sizes), strict=True)]
        if shares.weights is None:
            return cls(sizes, tuple(most), lengths, seed)
        if 0 in sizes:
            raise ValueError(f"source {sizes.index(0)} has a weight and no documents")
        cost = [float(np.mean(source)) if shares.by == "tokens" else 1.0 for source in lengths]
        of_sources = list(zip(most, cost, shares.weights, strict=True))
        epoch = min(count * each / weight for count, each, weight in of_sources)
        quotas = (min(count, max(1, round(weight * epoch / each))) for count, each, weight in of_sources)
        return cls(sizes, tuple(quotas), lengths, seed)

    @property
    def in_part(self) -> bool:
        """Whether epochs differ in the documents that they take."""
        return any(size and quota % size for size, quota in zip(self.sizes, self.quotas, strict=True))

    def draw(self, epoch: int) -> Indices:
        """The documents of an epoch, numbered over all sources; one that is repeated stands there as often."""
        firsts = np.cumsum([0, *self.sizes[:-1]]).tolist()
        return np.concatenate([first + self._of(source, epoch) for source, first in enumerate(firsts)])

    def _of(self, source: int, epoch: int) -> Indices:
        size, quota = self.sizes[source], self.quotas[source]
        dtype = np.int32 if sum(self.sizes) < 2**31 else np.int64
        if quota == 0:
            return np.arange(0, dtype=dtype)
        if quota % size == 0:
            return np.tile(np.arange(size, dtype=dtype), quota // size)
        lengths = self.lengths[source]
        total = int(lengths.sum())
        # in tokens from the beginning of the first order
        start, end = (number * quota * total // size for number in (epoch, epoch + 1))
        taken = []
        for number in range(start // total, -(-end // total)):
            order = np.random.default_rng((self.seed, source, number)).permutation(size)
            begins = number * total + np.cumsum(lengths[order], dtype=np.int64) - lengths[order]
            first, last = np.searchsorted(begins, (start, end))
            taken.append(order[first:last].astype(dtype))
        return np.concatenate(taken)
