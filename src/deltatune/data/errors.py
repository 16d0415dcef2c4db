"""The error for data that a user has to repair."""

from __future__ import annotations

from deltatune.config.errors import UserError

__all__ = ["DataError"]


class DataError(UserError):
    """A row, file or data option that cannot be trained on; one line that names where it is and the remedy."""
