"""What a reader of rows should know and no single row is wrong for: each thing once, counted, with its first place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["EMPTY_TARGET", "Notes"]

EMPTY_TARGET = (
    "an answer or text that trains is empty, or only whitespace, which teaches the model to end at once; remove it if "
    "that is not meant"
)


class Notes:
    """Sentences, each with the number of rows that it holds for and the first of them."""

    def __init__(self, found: Mapping[str, tuple[int, str]] | None = None) -> None:
        self._found = dict(found or {})

    def add(self, sentence: str, where: str) -> None:
        """Counts a row for a sentence; ``where`` names the row, and the first row's name is kept."""
        count, first = self._found.get(sentence, (0, where))
        self._found[sentence] = (count + 1, first)

    def update(self, later: Notes) -> None:
        """Adds what was found in rows that follow."""
        for sentence, (count, where) in later._found.items():
            before, first = self._found.get(sentence, (0, where))
            self._found[sentence] = (before + count, first)

    def to_dict(self) -> dict[str, tuple[int, str]]:
        """Sentence to (rows, first row), as ``Notes(...)`` takes it back."""
        return dict(self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[str]:
        """One line for each sentence: how often, and where first."""
        for sentence, (count, first) in self._found.items():
            rows = "1 row" if count == 1 else f"{count:,} rows"
            yield f"{sentence} ({rows}, the first is {first})"
