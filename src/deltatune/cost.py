"""What a layer costs: the work that no product with a weight counts, and what it keeps for backward."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Cost"]


class Cost(NamedTuple):
    """Of one forward of a layer, beyond its products with weights and their operands."""

    flops: float = 0.0  # floating-point operations
    kept: float = 0.0  # elements that backward reads, in the dtype of the activations
    kept_bytes: float = 0.0  # bytes that it reads of fixed dtypes, such as float32 log-sum-exps
