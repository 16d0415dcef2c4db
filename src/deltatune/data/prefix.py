"""What two texts begin with."""

from __future__ import annotations

__all__ = ["common_prefix"]


def common_prefix(a: str, b: str) -> int:
    """Characters that two texts share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
