"""Lengths to packs: best-fit decreasing, placed in bulk over the distinct lengths. Pure numpy."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack"]

Indices = NDArray[np.int64]


def pack(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Packs documents of these lengths into as few bins of ``capacity`` tokens as best-fit decreasing finds.

    The longest document goes first, each into the fullest bin that still has room, a new bin where none has. Lengths
    are small integers with many repeats, so all documents of one length are placed together: a bin with ``r`` tokens
    left takes ``r // length`` of them at once, which is what placing them one by one would do. Time is close to linear
    in the number of documents.

    Args:
        lengths: tokens of each document, integers in ``0..capacity``; an empty document is placed too (first bin).
        capacity: tokens a bin holds, >= 1.

    Returns:
        The bins, each the ascending indices of its documents; every index exactly once, no bin over the capacity. The
        same input always gives the same bins.

    Raises:
        ValueError: ``capacity`` below 1, lengths that are not one-dimensional integers, a negative length, or a length
            above ``capacity``.
    """
    counts = _checked_lengths(lengths, capacity)
    if counts.size == 0:
        return []
    order = np.argsort(-counts, kind="stable")
    bin_of = np.zeros(counts.size, dtype=np.int64)  # empty documents stay in bin 0
    bin_of[order] = _best_fit_decreasing(counts[order], capacity)
    by_bin = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of)).tolist()
    members = by_bin.tolist()
    return [members[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _checked_lengths(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> Indices:
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 token, got {capacity}")
    counts = np.asarray(lengths)
    if counts.size == 0:
        return np.zeros(0, dtype=np.int64)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"lengths must be one-dimensional integers, got {counts.dtype} of shape {counts.shape}")
    counts = counts.astype(np.int64)
    shortest, longest = int(counts.argmin()), int(counts.argmax())
    if counts[shortest] < 0:
        raise ValueError(f"lengths must be >= 0, got {counts[shortest]} at index {shortest}")
    if counts[longest] > capacity:
        raise ValueError(
            f"document {longest} holds {counts[longest]} tokens, more than the capacity of {capacity}; "
            "split or truncate it, or raise the capacity"
        )
    return counts


def _best_fit_decreasing(descending: Indices, capacity: int) -> Indices:
    """The bin of each document, for lengths in descending order."""
    bins = np.zeros(descending.size, dtype=np.int64)
    open_bins = _OpenBins()
    num_bins = 0
    lengths, starts = np.unique(-descending, return_index=True)
    ends = np.append(starts[1:], descending.size)
    for negative, start, end in zip(lengths.tolist(), starts.tolist(), ends.tolist(), strict=True):
        length, at = -negative, start
        while length and at < end:
            room = open_bins.best_fit(length)
            each = (room or capacity) // length
            wanted = -(-(end - at) // each)
            if room:
                chosen = open_bins.take(room, wanted)
            else:
                chosen = np.arange(num_bins, num_bins + wanted)
                num_bins += wanted
                room = capacity
            placed = min(end - at, chosen.size * each)
            bins[at : at + placed] = np.repeat(chosen, each)[:placed]
            at += placed
            full, rest = divmod(placed, each)
            open_bins.put(room - each * length, chosen[:full])
            open_bins.put(room - rest * length, chosen[full:])
    return bins


class _OpenBins:
    """Bins by the tokens they have left; ``_rooms`` holds the amounts that occur, ascending."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._bins: dict[int, list[Indices]] = {}

    def best_fit(self, length: int) -> int:
        """The least room >= ``length`` that some bin has; 0 if none has."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else 0

    def put(self, room: int, bins: Indices) -> None:
        if room == 0 or bins.size == 0:
            return
        if room not in self._bins:
            insort(self._rooms, room)
            self._bins[room] = []
        self._bins[room].append(bins)

    def take(self, room: int, wanted: int) -> Indices:
        """Removes up to ``wanted`` of the bins with this much room, the latest put first."""
        groups, taken = self._bins[room], []
        while groups and wanted:
            group = groups.pop()
            if group.size > wanted:
                groups.append(group[wanted:])
                group = group[:wanted]
            taken.append(group)
            wanted -= group.size
        if not groups:
            del self._bins[room]
            self._rooms.remove(room)
        return np.concatenate(taken)
