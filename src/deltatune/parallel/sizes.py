"""How many replicas, shards and ranks of a pack the processes of a run make, before any of them has met another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["Sizes", "choose_sizes"]


class Sizes(NamedTuple):
    """``replicate * shard`` processes; ``sequence`` neighbours share packs, ``expert`` neighbours the experts."""

    replicate: int  # copies of the weights
    shard: int  # ranks that hold one copy
    reason: str  # why, in words
    sequence: int = 1  # ranks that hold one pack
    sequence_reason: str = ""  # why, where it was chosen
    expert: int = 1  # ranks that hold the routed experts of a layer together

    @property
    def processes(self) -> int:
        """All of them."""
        return self.replicate * self.shard


def choose_sizes(
    processes: int,
    *,
    replicate: int | None,
    shard: int | None,
    sequence: int | None = 1,
    sequences: Sequence[int] = (1,),
    fits: Callable[[int, int], bool] = lambda _shard, _sequence: True,
) -> Sizes:
    """The sizes that were given, or those with which a step fits the device; the largest where none does.

    What is left open is the smallest that fits, ``sequence`` before ``shard``: a pack is divided only where no number
    of shards makes it fit. ``shard`` is 1 or a multiple of ``sequence``, the innermost axis.

    Args:
        processes: that were started.
        replicate, shard, sequence: None chooses.
        sequences: what ``sequence`` may be where it is chosen, ascending, 1 among them.
        fits: whether a step fits with so many shards and ranks of a pack; asked where more than one process runs and
            a choice is left.

    Raises:
        ValueError: sizes that these processes cannot make.
    """
    small = [size for size in range(1, math.isqrt(processes) + 1) if processes % size == 0]
    divisors = sorted({*small, *(processes // size for size in small)})
    for name, size in (("replicate", replicate), ("shard", shard), ("sequence", sequence)):
        if size is not None and size not in divisors:
            known = ", ".join(map(str, divisors))
            raise ValueError(f"{name}: {size} does not divide {processes} processes; choose one of {known}")
    if replicate is not None and shard is not None and replicate * shard != processes:
        raise ValueError(
            f"replicate: {replicate} times shard: {shard} is {replicate * shard}, and {processes} processes run; leave "
            "one of them at auto"
        )
    if shard is None and replicate is not None:
        shard = processes // replicate
    shards = divisors if shard is None else [shard]
    chosen = [size for size in sequences if size in divisors] if sequence is None else [sequence]
    pairs = [(part, ranks) for ranks in chosen for part in shards if part == 1 or part % ranks == 0]
    if not pairs:
        raise ValueError(
            f"shard: {shard} is neither 1 nor a multiple of sequence: {sequence}, whose ranks lie within one copy of "
            "the weights; choose another of them"
        )
    if processes == 1 or len(pairs) == 1:
        return _sizes(processes, *pairs[0], shard, sequence, fitting=True)
    fitting = next((pair for pair in pairs if fits(*pair)), None)
    return _sizes(processes, *(fitting or pairs[-1]), shard, sequence, fitting=fitting is not None)


def _sizes(
    processes: int, shard: int, ranks: int, given_shard: int | None, given_sequence: int | None, *, fitting: bool
) -> Sizes:
    """With the reasons of what was not given."""
    replicate = processes // shard
    if processes == 1:
        reason = "one process"
    elif given_shard is not None:
        reason = "as the recipe says"
    elif not fitting:
        reason = f"a step does not fit the device even with {shard} shards"
    elif shard == 1:
        reason = f"a step with whole weights fits the device: {replicate} copies"
    else:
        reason = f"a step fits the device with {shard} shards of the weights"
    if given_sequence is not None or ranks == 1:
        why = ""
    elif fitting:
        why = f"a step fits the device where {ranks} ranks hold a pack together, and not with fewer"
    else:
        why = f"a step does not fit the device even where {ranks} ranks hold a pack together"
    return Sizes(replicate, shard, reason, ranks, why)
