"""Rows that cannot be trained on, where none of them is left out: the first of them in one error."""

from __future__ import annotations

from collections.abc import Sequence

from deltatune.data.report import counted
from deltatune.errors import DataError

__all__ = ["bad_rows", "rows_read"]

NUM_SHOWN = 5
_REMEDY = "data.on_bad_row: drop leaves such rows out"


def bad_rows(name: str, found: Sequence[tuple[str, str]], count: int, read: str) -> DataError:
    """The error that names the first five bad rows of a source, equal faults together, and counts all that were met.

    Args:
        name: of the source.
        found: of the first bad rows, one at least, the place in words and the message of the error.
        count: how many bad rows there are among those that were read.
        read: which rows those are, such as ``rows_read`` says it.
    """
    if count == 1:
        return DataError(f"{found[0][1]}; {_REMEDY}")
    faults: dict[str, list[str]] = {}
    for where, message in found[:NUM_SHOWN]:
        faults.setdefault(message.removeprefix(where), []).append(where.removeprefix(f"{name}, "))
    shown = [f"{first}{_also(others)}{fault}" for fault, (first, *others) in faults.items()]
    if count > NUM_SHOWN:
        shown.append(f"and {count - NUM_SHOWN:,} more")
    return DataError(f"{name}: {count:,} of {read} cannot be trained on: {'; '.join(shown)}; {_REMEDY}")


def rows_read(number: int, *, whole: bool) -> str:
    """The first so many rows of a source, in words; all of them where they are the ``whole``."""
    return counted(number, "row") if whole else f"the first {counted(number, 'row')}"


def _also(places: Sequence[str]) -> str:
    return f" (also {', '.join(places)})" if places else ""
