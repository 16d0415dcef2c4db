"""Rows that can be read in any order, each with a name for errors: one source, or stretches of several."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deltatune.errors import DataError

__all__ = ["BadRowError", "Part", "Rows", "RowsOf", "digest", "read_on"]

T = TypeVar("T")


class BadRowError(DataError):
    """A row that is broken in its file, beside others that can be read."""


class Rows:
    """Rows that several processes may read, in any order. What is kept in memory per row is a number or two.

    Attributes:
        name: the source as the user wrote it.
        columns: the names of its columns; of JSON those of its first rows, which need not share a schema.
        identity: a digest of the content, equal for equal rows.
        columnar: whether the source is a table, where a field that a row lacks is there and ``None``.
    """

    columnar = False

    def __init__(self, name: str, columns: Iterable[str], identity: str, num_rows: int) -> None:
        self.name, self.columns, self.identity = name, tuple(dict.fromkeys(columns)), identity
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows ``start`` to ``end``, as far as there are any.

        Raises:
            BadRowError: a row that is broken; those after it can be read.
            DataError: a file that cannot be read, or has changed since it was opened.
        """
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The place of a row in words: file and line, or data set and row."""
        return f"{self.name}, row {index + 1}"


class Part(NamedTuple):
    """A stretch of rows."""

    rows: Rows
    start: int
    end: int


class RowsOf(Rows):
    """Stretches of several sources, one after the other."""

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if part.end > part.start]
        self._starts = np.cumsum([0, *(part.end - part.start for part in self._parts)]).tolist()
        identity = digest(repr([(rows.identity, start, end) for rows, start, end in self._parts]).encode())
        columns = (column for part in self._parts for column in part.rows.columns)
        super().__init__(name, columns, identity, self._starts[-1])
        self.columnar = any(part.rows.columnar for part in self._parts)

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        """As ``Rows.read``, over the ends of the stretches."""
        end = min(end, len(self))
        for part, first in zip(self._parts, self._starts, strict=False):
            if start < first + part.end - part.start and end > first:
                yield from part.rows.read(part.start + max(0, start - first), min(part.end, part.start + end - first))

    def where(self, index: int) -> str:
        """The place of a row in the file that it comes from."""
        number = bisect_right(self._starts, index) - 1
        part = self._parts[number]
        return part.rows.where(part.start + index - self._starts[number])


def read_on(read: Callable[[int, int], Iterable[T]], start: int, end: int) -> Iterator[tuple[int, T | BadRowError]]:
    """What ``read`` gives from ``start`` to ``end``, numbered; a row that is broken comes as its error."""
    index = start
    while index < end:
        try:
            for row in read(index, end):
                yield index, row
                index += 1
        except BadRowError as error:
            yield index, error
            index += 1
        else:
            return


def digest(content: bytes) -> str:
    """A short digest that names content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
