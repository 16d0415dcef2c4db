"""Lengths to packs that hold what shuffled data would: documents in random order, the end of each pack chosen to fit.

Best-fit decreasing sorts documents by length, so that nearly all of the variance of length lies between packs, every
source with lengths of its own gets packs of its own, and the same documents meet in every epoch. Here a pack takes
documents from a shuffled queue until some 30% of it are left, and fills the rest from the next documents in the queue.
Packs are full, so the mean length in a pack is the capacity over its number of documents: the rest is chosen to bring
that number close to the average, and what remains to a document or two that fit best.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltatune.packing.bins import pack

__all__ = ["Packs", "pack_ahead", "pack_shuffled"]

Indices = NDArray[np.integer]

_WINDOW = 500  # documents of the queue that the end of a pack is chosen from
_REST = 0.3  # share of a pack that is chosen; more is closer to the average and slower
_PAIRS = 8  # documents on either side of half the room that the last pair is looked for among
_FEW = 4  # documents per pack below which sorting may fill better
_TOLERANCE = 1.003  # times the packs of best-fit decreasing

_PLACE_BITS = 40  # a document of the window is one integer, (length, place in the queue), so that a list sorts it
_PLACE = (1 << _PLACE_BITS) - 1


@dataclass(frozen=True, eq=False)
class Packs:
    """Documents by pack, in flat arrays."""

    members: Indices  # [D], numbers of documents, pack after pack; int32 where that holds them
    starts: Indices  # [P + 1], where each pack begins in members

    def __len__(self) -> int:
        return self.starts.size - 1

    def __getitem__(self, index: int) -> Indices:
        """The documents of a pack."""
        index = range(len(self))[index]
        return self.members[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[Indices]:
        return map(self.__getitem__, range(len(self)))


def pack_shuffled(lengths: NDArray[np.integer], capacity: int, *, seed: int | tuple[int, ...] | None = 0) -> Packs:
    """Packs documents of these lengths as shuffled data, at the fill of best-fit decreasing within about 0.3%.

    Where a pack holds fewer than four documents on average, best-fit decreasing takes over if it needs fewer packs by
    more than that: there a pack of long documents can only be filled by one of a certain length. Time is linear, about
    2 microseconds a document.

    Args:
        lengths: tokens of each document, integers in ``1..capacity``, ``[D]``.
        capacity: tokens a pack holds.
        seed: of the order; the same seed gives the same packs, and ``None`` takes documents as they come.

    Returns:
        The packs, every document exactly once.

    Raises:
        ValueError: a length outside ``1..capacity``.
    """
    counts = np.asarray(lengths)
    if counts.size and not 1 <= counts.min() <= counts.max() <= capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, got {counts.min()} to {counts.max()}")
    order = np.arange(counts.size, dtype=_dtype(counts.size))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    packs = _Queue(counts[order], capacity).packs()
    if counts.size and capacity < _FEW * counts.mean():
        sorted_packs = pack(counts[order], capacity)
        if len(packs) > _TOLERANCE * len(sorted_packs):
            members = np.concatenate([np.asarray(members, dtype=order.dtype) for members in sorted_packs])
            packs = Packs(members, np.cumsum([0, *map(len, sorted_packs)]))
    return Packs(order[packs.members], packs.starts)


def pack_ahead(lengths: NDArray[np.integer], capacity: int) -> tuple[Packs, Indices]:
    """Packs documents as they come, as long as there are others ahead to fill a pack from.

    Args:
        lengths: tokens of each document of the queue, integers in ``1..capacity``, ``[D]``.
        capacity: tokens a pack holds.

    Returns:
        The packs, and the documents that are left, in order: they begin the queue that more documents are put to.
    """
    queue = _Queue(np.asarray(lengths, dtype=np.int64), capacity)
    return queue.packs(least_ahead=_WINDOW), queue.left()


def _dtype(size: int) -> type[np.signedinteger[Any]]:
    return np.int32 if size < 2**31 else np.int64


class _Queue:
    """Documents in the order they are taken; a window of those ahead can be taken out of turn, by length."""

    def __init__(self, lengths: Indices, capacity: int) -> None:
        self._lengths = memoryview(np.ascontiguousarray(lengths).data)
        self._taken = bytearray(lengths.size)
        self._front = 0  # nothing before this place is left
        self._seen = 0  # places before this one are in the window, if they are left
        self._window: list[int] = []
        self._capacity = capacity
        self._documents_per_pack = capacity / lengths.mean() if lengths.size else 0.0

    def packs(self, least_ahead: int = 1) -> Packs:
        """Packs, as long as so many documents are in the window."""
        members, starts = array("i" if len(self._lengths) < 2**31 else "q"), array("q", [0])
        self._refill()
        while len(self._window) >= least_ahead:
            self._fill(members)
            starts.append(len(members))
            self._refill()
        return Packs(np.frombuffer(members, dtype=_dtype(len(self._lengths))), np.frombuffer(starts, dtype=np.int64))

    def left(self) -> Indices:
        """The places of the documents that are in no pack."""
        return np.flatnonzero(np.frombuffer(self._taken, dtype=np.uint8) == 0)

    def _refill(self) -> None:
        end = min(len(self._lengths), self._seen + _WINDOW - len(self._window))
        ahead = [(self._lengths[place] << _PLACE_BITS) | place for place in range(self._seen, end)]
        if len(ahead) < 12:  # measured: sorting the window costs as much
            for key in ahead:
                insort(self._window, key)
        else:
            self._window += ahead
            self._window.sort()
        self._seen = max(self._seen, end)

    def _fill(self, members: array[int]) -> None:
        """Appends the documents of one pack."""
        first = len(members)
        room = self._take_in_order(members)
        while fitting := bisect_left(self._window, (room + 1) << _PLACE_BITS):
            length = self._choose(fitting, room, self._documents_per_pack - (len(members) - first))
            key = self._window.pop(bisect_left(self._window, length << _PLACE_BITS))  # of equal ones the first in line
            place = key & _PLACE
            members.append(place)
            self._taken[place] = True
            room -= length

    def _take_in_order(self, members: array[int]) -> int:
        """Takes documents as they come, until the rest of the pack is to be chosen; the tokens left."""
        lengths, taken, window = self._lengths, self._taken, self._window
        room, least = self._capacity, self._capacity * _REST
        # the first in line at least, or it might wait for ever
        most = len(members) + max(1, int(self._documents_per_pack - 1))
        while taken[self._front]:
            self._front += 1
        place = self._front
        while place < self._seen and room > least and len(members) < most:
            if not taken[place]:
                length = lengths[place]
                if length > room:
                    break
                members.append(place)
                taken[place] = True
                room -= length
                del window[bisect_left(window, (length << _PLACE_BITS) | place)]
            place += 1
        return room

    def _choose(self, fitting: int, room: int, wanted: float) -> int:
        """Which length of the window's first ``fitting`` documents goes next into a pack that is ``wanted`` short of
        the average number of documents."""
        index = fitting - 1
        if wanted >= 2.5:
            index = min(index, bisect_left(self._window, int(room / wanted) << _PLACE_BITS))
        elif wanted >= 1.5:
            index = self._first_of_pair(fitting, room)
        return self._window[index] >> _PLACE_BITS

    def _first_of_pair(self, fitting: int, room: int) -> int:
        """The document near half the room that leaves least of it together with another."""
        window = self._window
        middle = min(fitting - 1, bisect_left(window, (room // 2) << _PLACE_BITS))
        chosen, least = fitting - 1, room + 1
        for index in range(max(0, middle - _PAIRS), min(fitting, middle + _PAIRS)):
            left = room - (window[index] >> _PLACE_BITS)
            other = bisect_left(window, (left + 1) << _PLACE_BITS) - 1
            if other == index:
                other -= 1
            if other >= 0:
                left -= window[other] >> _PLACE_BITS
            if left < least:
                chosen, least = index, left
        return chosen
