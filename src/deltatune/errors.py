"""The exceptions that mean: the recipe or the input is at fault, not the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DataError", "UserError", "first_line", "near_files", "nearest", "one_line"]


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came, and the remedy.

    The command line prints it as one line and exits with status 2.
    """


class DataError(UserError):
    """A row, file or data option that cannot be trained on; one line that names where it is and the remedy."""


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message that holds anything; reports of compilers and loaders are long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean x?)"`` for the closest known name, or nothing when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def near_files(path: Path) -> str:
    """What the folder of a missing file or folder holds instead, to follow the words that it is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {folder.resolve()} holds nothing of a like name"
