"""Which documents of a pack go to which of the ranks that hold it, where all of them fit whole. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["WholeDocuments"]

_FILLING: Final = 10
"""Documents for each rank, the shortest, that are chosen to fill what is left: enough sums to meet nearly any room."""


@dataclass(frozen=True)
class WholeDocuments:
    """Ranks that hold equal parts of a pack, and when whole documents should go to them.

    A pack whose documents all lie whole on ranks needs no exchange between these. Attention is then as uneven as the
    sums of squared lengths, where ranks that exchange have the same of it.

    Attributes:
        ranks: that hold a pack, >= 1.
        worth: what a rank's exchange costs in squared tokens of attention, for each token of its part: the largest sum
            of squares may be above their mean by so much.
    """

    ranks: int
    worth: float = math.inf

    def divide(self, lengths: Sequence[int], size: int) -> list[list[int]] | None:
        """The documents of each rank by number, ascending; a function of the arguments alone.

        The longest go first, each to the rank with the least squares that has room. The shortest fill each rank in
        turn, as nearly as sums of their lengths can.

        Args:
            lengths: tokens of each document, >= 1.
            size: tokens that a rank holds.

        Returns:
            None where documents do not fit so, none was found, or it is not worth it.
        """
        if self.ranks == 1 or max(lengths) > size or sum(lengths) > self.ranks * size:
            return None
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        first, rest = order[: -_FILLING * self.ranks], order[-_FILLING * self.ranks :]
        parts: list[list[int]] = [[] for _ in range(self.ranks)]
        rooms, squares = [size] * self.ranks, [0] * self.ranks
        # room for a share of the shortest everywhere: their sums then meet every room
        spare = sum(lengths[number] for number in rest) // (2 * self.ranks)
        for number in first:
            fitting = [rank for rank in range(self.ranks) if rooms[rank] - spare >= lengths[number]]
            rank = min(fitting or range(self.ranks), key=squares.__getitem__)
            if rooms[rank] < lengths[number]:
                return None
            parts[rank].append(number)
            rooms[rank] -= lengths[number]
            squares[rank] += lengths[number] ** 2
        # of every length some come early, so that each rank takes of all
        rest = [number for start in range(self.ranks) for number in rest[start :: self.ranks]]
        for rank in sorted(range(self.ranks), key=rooms.__getitem__):
            taken = _fullest([lengths[number] for number in rest], rooms[rank])
            parts[rank] += [rest[place] for place in taken]
            squares[rank] += sum(lengths[rest[place]] ** 2 for place in taken)
            rest = [number for place, number in enumerate(rest) if place not in taken]
        if rest or max(squares) - sum(squares) / self.ranks > self.worth * size:
            return None
        return [sorted(part) for part in parts]


def _fullest(lengths: Sequence[int], room: int) -> set[int]:
    """The places of lengths whose sum is the largest within ``room``, early ones first."""
    reached = [1]  # bit s: some of the lengths so far have the sum s
    within = (1 << (room + 1)) - 1
    for length in lengths:
        reached.append(reached[-1] | (reached[-1] << length & within))
    left, taken = reached[-1].bit_length() - 1, set[int]()
    for place in range(len(lengths) - 1, -1, -1):
        if not reached[place] >> left & 1:
            taken.add(place)
            left -= lengths[place]
    return taken
