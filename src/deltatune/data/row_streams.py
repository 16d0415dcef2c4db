"""Rows in order and without an end: local ones by their place, those of the Hub as they are fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deltatune.data.formats import Row
from deltatune.data.rows import Rows
from deltatune.data.sources import is_local, load_rows
from deltatune.data.table_rows import hub_stream
from deltatune.errors import DataError

__all__ = ["Fetched", "Repeated", "open_stream"]


def open_stream(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    needed: Iterable[str] = (),
    cache_dir: Path | None = None,
) -> Repeated | Fetched:
    """Rows as ``load_rows`` finds them, with its arguments; those of the Hub are fetched as they are read.

    Raises:
        DataError: nothing there, or a file that cannot be read.
    """
    if is_local(path):
        return Repeated(
            load_rows(path, split=split, name=name, revision=revision, limit=limit, needed=needed, cache_dir=cache_dir)
        )
    where, rows, commit = hub_stream(path, split or "train", name, revision)
    return Fetched(where, rows if limit is None else rows.take(limit), commit)


class Repeated:
    """Local rows, over and over."""

    def __init__(self, rows: Rows) -> None:
        self.name, self.identity, self._rows = rows.name, rows.identity, rows
        self.columns, self.columnar = rows.columns, rows.columnar

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, end: int) -> Iterator[tuple[str, Row]]:
        """Rows ``start`` to ``end``, each with its place in words."""
        size = len(self._rows)
        while start < end:
            first = start % size
            last = min(size, first + end - start)
            for index, row in enumerate(self._rows.read(first, last), first):
                yield self._rows.where(index), row
            start += last - first


class Fetched:
    """An iterable data set, over and over; rows that are asked for in order are fetched once.

    Args:
        name: for errors.
        rows: a ``datasets.IterableDataset``: iterable from the first row, and ``skip(n)``.
        identity: the commit that they are fetched from, since a digest would take all of them.
    """

    columnar = True

    def __init__(self, name: str, rows: Any, identity: str) -> None:
        self.name, self.identity, self._rows = name, identity, rows
        names = rows.column_names
        self.columns = tuple(names if names is not None else next(iter(rows), {}))
        self._iterator: Iterator[Row] = iter(())
        self._place = -1  # the number of the row that the iterator gives next; none yet
        self._read = 0  # rows that it gave
        self._size: int | None = None  # rows, once the end was seen

    def read(self, start: int, end: int) -> Iterator[tuple[str, Row]]:
        """Rows ``start`` to ``end``, each with its place in words.

        Raises:
            DataError: there are no rows at all.
        """
        if start != self._place:
            self._go_to(start)
        while self._place < end:
            row = next(self._iterator, None)
            if row is None:
                self._begin_again()
                continue
            index = self._place if self._size is None else self._place % self._size
            self._place += 1
            self._read += 1
            yield f"{self.name}, row {index + 1}", row

    def _go_to(self, start: int) -> None:
        within = start if self._size is None else start % self._size
        self._iterator, self._place, self._read = iter(self._rows.skip(within)), start, 0

    def _begin_again(self) -> None:
        """At the end of the rows: back to the first, or to the place that was asked for beyond the end."""
        if self._size is not None and not self._read:
            raise DataError(f"{self.name} ended after fewer than {self._size:,} rows, which it had before")
        if self._size is None:
            # an iterator that gave rows was at its place; one that gave none may have begun beyond the end
            self._size = self._place if self._read else sum(1 for _ in self._rows)
        if not self._size:
            raise DataError(f"{self.name} holds no rows; expected at least one")
        self._go_to(self._place)

    def __getstate__(self) -> dict[str, object]:
        """Without the iterator, which another process opens again."""
        return {**self.__dict__, "_iterator": iter(()), "_place": -1}
