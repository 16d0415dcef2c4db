"""Which packs are computed together: those of like cost, so that no rank waits long for another."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["WINDOW", "steps_of_like_cost"]

WINDOW: Final = 8
"""Optimizer steps whose packs are exchanged. A small one keeps steps random; see ``steps_of_like_cost``."""


def steps_of_like_cost(
    order: NDArray[np.int64], costs: NDArray[np.integer], per_step: int, generator: torch.Generator
) -> NDArray[np.int64]:
    """Packs in another order, in which those of a step, and next to each other in it, cost about the same.

    Ranks wait for the one whose pack costs most, at the end of a step or, with sharded weights, of each micro-batch.
    Packs have the same number of tokens, so they differ in what attention costs, ``sum(length ** 2)`` over documents.
    The order is cut into windows of ``WINDOW`` steps, a window's packs are sorted by cost and cut into its steps, and
    the steps are shuffled: every pack stays within its window, and no step is early or late for what it costs. A short
    last step stays last, and holds the packs it held.

    Args:
        order: the packs of an epoch in random order, ``[P]``.
        costs: of the packs by number, ``[P]``.
        per_step: packs of an optimizer step on all ranks, >= 1.
        generator: of the order of a window's steps.
    """
    whole = len(order) // per_step * per_step
    dealt = []
    for start in range(0, whole, WINDOW * per_step):
        packs = order[start : min(start + WINDOW * per_step, whole)]
        steps = packs[np.argsort(costs[packs], kind="stable")].reshape(-1, per_step)
        dealt.append(steps[torch.randperm(len(steps), generator=generator).numpy()].ravel())
    return np.concatenate([*dealt, order[whole:]])
