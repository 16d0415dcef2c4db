"""What a layer costs: the work that no product with a weight counts, and what it keeps for backward."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["WHOLE", "Cost", "ExpertSplit"]


class Cost(NamedTuple):
    """Of one forward of a layer, beyond its products with weights and their operands."""

    flops: float = 0.0  # floating-point operations
    kept: float = 0.0  # elements that backward reads, in the dtype of the activations
    kept_bytes: float = 0.0  # bytes that it reads of fixed dtypes, such as float32 log-sum-exps


class ExpertSplit(NamedTuple):
    """How the routed experts of a layer are divided."""

    ranks: int = 1  # that hold them together
    capacity: float = 1.5  # how many times its even share of all visits a rank has room for


WHOLE: Final = ExpertSplit()
"""Every rank holds all experts."""
