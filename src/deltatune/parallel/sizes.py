"""How many replicas and shards the processes of a run make, before any of them has met another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Sizes", "choose_sizes"]


class Sizes(NamedTuple):
    """``replicate * shard`` processes."""

    replicate: int  # copies of the weights
    shard: int  # ranks that hold one copy
    reason: str  # why, in words


def choose_sizes(
    processes: int, *, replicate: int | None, shard: int | None, fits: Callable[[int], bool] = lambda _: True
) -> Sizes:
    """The sizes that were given, or the fewest shards whose step fits the device; all processes where none does.

    Args:
        processes: that were started.
        replicate, shard: None chooses.
        fits: whether a step fits with so many shards; asked where both are left open, and more than one process runs.

    Raises:
        ValueError: sizes whose product is not the number of processes.
    """
    divisors = [size for size in range(1, processes + 1) if processes % size == 0]
    for name, size in (("replicate", replicate), ("shard", shard)):
        if size is not None and size not in divisors:
            known = ", ".join(map(str, divisors))
            raise ValueError(f"{name}: {size} does not divide {processes} processes; choose one of {known}")
    if replicate is not None and shard is not None and replicate * shard != processes:
        raise ValueError(
            f"replicate: {replicate} times shard: {shard} is {replicate * shard}, and {processes} processes run; leave "
            "one of them at auto"
        )
    if shard is not None or replicate is not None:
        shard = processes // (replicate or 1) if shard is None else shard
        return Sizes(processes // shard, shard, "as the recipe says")
    if processes == 1:
        return Sizes(1, 1, "one process")
    fitting = next((size for size in divisors if fits(size)), None)
    if fitting == 1:
        return Sizes(processes, 1, f"a step with whole weights fits the device: {processes} replicas")
    if fitting is None:
        return Sizes(1, processes, f"a step does not fit the device even with {processes} shards")
    return Sizes(processes // fitting, fitting, f"a step fits the device with {fitting} shards of the weights")
