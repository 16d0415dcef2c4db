"""The packs of every epoch: documents drawn and packed anew, always into the same number of packs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltatune.data.mixture import Mixture
from deltatune.packing.shuffled import Packs, pack_shuffled

__all__ = ["Epochs"]

_ATTEMPTS = 8  # orders that are tried for an epoch after the first
_SPARE = 2000  # one pack in so many is left spare, so that other orders need no more packs than the first had


class Epochs:
    """Packs by epoch, a function of the documents, the mixture and the seed alone.

    The number of packs is the same in every epoch, so that steps, schedules and resumed runs can count on it: what an
    order needs fewer is made up by cutting packs of many documents in two.

    Attributes:
        num_packs: packs of an epoch.
    """

    def __init__(self, lengths: NDArray[np.integer], capacity: int, mixture: Mixture, *, seed: int | None) -> None:
        """``lengths``: tokens of every document of all sources; ``seed=None`` keeps the order of the mixture."""
        self._lengths, self._capacity, self._mixture, self._seed = lengths, capacity, mixture, seed
        self._first = self._pack(0, 0)
        # epochs that take a part of a source differ by a document or two
        spare = max(len(self._first) // _SPARE, int(mixture.in_part))
        spare = min(spare, self._first.members.size - len(self._first))
        self.num_packs = len(self._first) + spare
        self._latest = (0, _in_number(self._first, self.num_packs))

    def __call__(self, epoch: int) -> Packs:
        """The packs of an epoch; their members are numbers of documents."""
        number, packs = self._latest
        if number != epoch:
            packs = _in_number(self._first if epoch == 0 else self._anew(epoch), self.num_packs)
            self._latest = (epoch, packs)
        return packs

    def _anew(self, epoch: int) -> Packs:
        for attempt in range(_ATTEMPTS):
            packs = self._pack(epoch, attempt)
            if len(packs) <= self.num_packs:
                return packs
        # of documents that are others in every epoch, those of a nearly empty pack may wait for their next turn
        return _fullest(packs, self.num_packs, self._lengths) if self._mixture.in_part else self._first

    def _pack(self, epoch: int, attempt: int) -> Packs:
        documents = self._mixture.draw(epoch)
        seed = None if self._seed is None else (self._seed, epoch, attempt)
        packs = pack_shuffled(self._lengths[documents], self._capacity, seed=seed)
        return Packs(documents[packs.members], packs.starts)


def _in_number(packs: Packs, number: int) -> Packs:
    """The same documents in so many packs, no fewer than there are: those of most documents are cut in two.

    Of documents that are fewer than the packs, the first come again.
    """
    members, starts = packs.members, packs.starts
    if (short := number - members.size) > 0:
        members = np.concatenate([members, np.resize(members, short)])
        starts = np.concatenate([starts, np.arange(members.size - short, members.size) + 1])
    while starts.size - 1 < number:
        sizes = np.diff(starts)
        most = np.argsort(-sizes, kind="stable")[: number - sizes.size]
        most = most[sizes[most] > 1]
        starts = np.sort(np.concatenate([starts, starts[most] + sizes[most] // 2]))
    return Packs(members, starts)


def _fullest(packs: Packs, number: int, lengths: NDArray[np.integer]) -> Packs:
    """So many packs, those of most tokens, in their order."""
    tokens = np.add.reduceat(lengths[packs.members], packs.starts[:-1], dtype=np.int64)
    kept = np.isin(np.arange(len(packs)), np.argsort(-tokens, kind="stable")[:number])
    sizes = np.diff(packs.starts)
    return Packs(packs.members[np.repeat(kept, sizes)], np.concatenate([[0], np.cumsum(sizes[kept])]))
