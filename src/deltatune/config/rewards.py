"""What is logged beside a loss over pairs of answers."""

from __future__ import annotations

from typing import Final

__all__ = ["REWARDS"]

REWARDS: Final = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Means over pairs, by TRL's names."""
