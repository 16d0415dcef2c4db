"""How many ranks can hold a number of experts together, and what is said where they cannot."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["common_sizes", "no_experts", "not_divided"]


def common_sizes(counts: Collection[int]) -> tuple[int, ...]:
    """The numbers of ranks that divide layers of so many experts, ascending, 1 among them."""
    return tuple(size for size in range(1, min(counts, default=1) + 1) if not any(count % size for count in counts))


def no_experts(size: int) -> str:
    """What is said of a size for a model without experts."""
    return f"expert={size}: it has no experts; leave expert out"


def not_divided(size: int, counts: Collection[int]) -> str:
    """What is said of a size that does not divide layers of so many experts."""
    written = " and ".join(sorted(map(str, set(counts))))
    choices = ", ".join(map(str, common_sizes(counts)))
    return f"expert={size} does not divide {written} experts; set expert to one of {choices}"
