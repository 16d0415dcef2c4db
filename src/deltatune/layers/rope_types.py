"""What the types of rotary embeddings say of themselves, without torch."""

from __future__ import annotations

__all__ = ["depends_on_length"]


def depends_on_length(rope_type: str) -> bool:
    """Whether frequencies of this type are those of a document's length."""
    return "dynamic" in rope_type or rope_type == "longrope"
