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


@dataclass(frozen=True, eq=False)
class Mixture:
    """Draws every epoch's documents from the sources.

    A source's documents come in one shuffled order after another, and an epoch takes the next of them, as many as hold
    the tokens that are its due. So over the epochs every document is seen equally often, up to one, however small its
    source's share is; and all epochs are of one length, to within a document of each source.
    """

    lengths: tuple[NDArray[np.integer], ...]  # tokens of each document of each source
    quotas: tuple[int, ...]  # documents that an epoch takes of it on average
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
        sizes = [len(source) for source in lengths]
        most = [size * repeat for size, repeat in zip(sizes, shares.repeats or [1] * len(sizes), strict=True)]
        if shares.weights is None:
            return cls(tuple(lengths), tuple(most), seed)
        if 0 in sizes:
            raise ValueError(f"source {sizes.index(0)} has a weight and no documents")
        cost = [float(np.mean(source)) if shares.by == "tokens" else 1.0 for source in lengths]
        of_sources = list(zip(most, cost, shares.weights, strict=True))
        epoch = min(count * each / weight for count, each, weight in of_sources)
        quotas = (min(count, max(1, round(weight * epoch / each))) for count, each, weight in of_sources)
        return cls(tuple(lengths), tuple(quotas), seed)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents of each source."""
        return tuple(map(len, self.lengths))

    @property
    def is_constant(self) -> bool:
        """Whether every epoch takes the same documents."""
        return not any(quota % size for quota, size in zip(self.quotas, self.sizes, strict=True) if size)

    def draw(self, epoch: int) -> Indices:
        """The documents of an epoch, numbered over all sources; one that is repeated stands there as often."""
        firsts = np.cumsum([0, *self.sizes[:-1]]).tolist()
        return np.concatenate([first + self._of(source, epoch) for source, first in enumerate(firsts)])

    def _of(self, source: int, epoch: int) -> Indices:
        lengths, quota = self.lengths[source].astype(np.int64), self.quotas[source]
        size = len(lengths)
        dtype = np.int32 if sum(self.sizes) < 2**31 else np.int64
        if quota == 0:
            return np.arange(0, dtype=dtype)
        if quota % size == 0:
            return np.tile(np.arange(size, dtype=dtype), quota // size)
        # an order holds so many tokens, and an epoch takes the documents that begin in its stretch of all orders
        tokens = int(lengths.sum())
        begin, end = (number * quota * tokens // size for number in (epoch, epoch + 1))
        drawn = []
        for number in range(begin // tokens, -(-end // tokens)):
            order = np.random.default_rng((self.seed, source, number)).permutation(size)
            starts = number * tokens + np.cumsum(lengths[order]) - lengths[order]
            drawn.append(order[slice(*np.searchsorted(starts, (begin, end)))])
        return np.concatenate(drawn).astype(dtype)
