"""Rows of JSONL, JSON and Parquet files, and of data sets on the Hub, each row with a name for errors."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltatune.data.json_values import unreadable
from deltatune.errors import DataError, near_files, one_line

__all__ = ["Rows", "load_rows"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Rows:
    """Rows that can be read in any order, and by several processes: a list of objects, or a ``datasets.Dataset``.

    Attributes:
        name: the source as the user wrote it.
        columns: the names of its columns.
        identity: a digest of the content, equal for equal rows.
        columnar: whether one schema holds for all rows, so that keys a row never had come as ``None``.
    """

    def __init__(self, name: str, columns: Iterable[str], identity: str, rows: Any, *, columnar: bool = False) -> None:
        self.name, self.columns, self.identity = name, tuple(dict.fromkeys(columns)), identity
        self.columnar = columnar
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows ``start`` to ``end``, as far as there are any."""
        for index in range(start, min(end, len(self))):
            try:
                row = self._rows[index]
            except UnicodeDecodeError as error:
                raise DataError(f"{self.where(index)} holds text that is not UTF-8: {one_line(error)}") from None
            yield row

    def where(self, index: int) -> str:
        """The place of a row in words: file and line, or data set and row."""
        return f"{self.name}, row {index + 1}"


def load_rows(path: str, *, split: str = "train", name: str | None = None, limit: int | None = None) -> Rows:
    """Opens a file, a pattern of files, a folder of files, or a data set on the Hub.

    JSON files are checked line by line here and stay as they are: no common schema is forced on their rows. Parquet
    files and the Hub are read through the ``datasets`` library.

    Args:
        path: ``*.jsonl``, ``*.ndjson``, ``*.json`` (a list of objects), ``*.parquet``, or a name on the Hub.
        split, name: the split and the configuration of a data set on the Hub.
        limit: use the first so many rows only.

    Raises:
        DataError: nothing there (near names are given), a file that is empty or broken (its line is given), no row.
    """
    files = _local_files(path)
    parts = [_hub_rows(path, split, name)] if files is None else [_file_rows(file) for file in files]
    total = sum(map(len, parts))
    rows = parts[0] if len(parts) == 1 else _ManyRows(path, parts, total)
    if limit is not None and limit < total:
        rows = _ManyRows(rows.name, parts, limit)
    if len(rows) == 0:
        raise DataError(f"{path} holds no rows; expected at least one")
    return rows


def _local_files(path: str) -> list[Path] | None:
    """The files that a path stands for; ``None`` for a name on the Hub."""
    local = Path(path).expanduser()
    expected = f"expected {', '.join(_SUFFIXES)}"
    if local.is_file():
        if local.suffix not in _SUFFIXES:
            raise DataError(f"{path} is no data file: {expected}, got {local.suffix or 'no suffix'}")
        return [local]
    if local.is_dir():
        found, nothing = local.rglob("*"), "holds no data files"
    elif any(character in path for character in "*?["):
        anchor = Path(local.anchor) if local.is_absolute() else Path()
        found, nothing = anchor.glob(str(local.relative_to(anchor))), "matches no data file"
    elif local.suffix in _SUFFIXES or path.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{path} does not exist{near_files(local)}")
    else:
        return None
    files = sorted(file for file in found if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{path} {nothing}; {expected}")
    return files


def _file_rows(file: Path) -> Rows:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; expected at least one row")
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    return _json_rows(file) if file.suffix == ".json" else _JsonLines(file)


class _JsonLines(Rows):
    """One object per line; blank lines are passed over. Lines are found once and parsed when they are read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        columns: dict[str, None] = {}
        found = []  # (where a line begins, its number)
        digest, offset = hashlib.blake2b(digest_size=16), 0
        with file.open("rb") as stream:
            for line, content in enumerate(stream, start=1):
                digest.update(content)
                if content.strip():
                    columns |= dict.fromkeys(_parse_line(content, f"{file}, line {line}"))
                    found.append((offset, line))
                offset += len(content)
        if not found:
            raise DataError(f"{file} holds blank lines only; expected one JSON object per line")
        super().__init__(str(file), columns, digest.hexdigest(), np.array(found))

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        with self._file.open("rb") as stream:
            for index in range(start, min(end, len(self))):
                stream.seek(int(self._rows[index, 0]))
                yield _parse_line(stream.readline(), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.name}, line {self._rows[index, 1]}"


def _parse_line(content: bytes, where: str) -> dict[str, Any]:
    row = _parse(content.rstrip(b"\r\n"), where, "expected one JSON object per line")
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}; expected one JSON object per line")
    return row


def _parse(content: bytes, where: str, expected: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.doc.count("\n") else ""
        raise DataError(f"{where}{line} is not valid JSON: {error.msg} at column {error.colno}; {expected}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {unreadable(error)}") from None


def _json_rows(file: Path) -> Rows:
    content = file.read_bytes()
    rows = _parse(content, str(file), "expected a list of objects (one object per line belongs in a .jsonl file)")
    if not isinstance(rows, list):
        raise DataError(f"{file} is a JSON {type(rows).__name__}; expected a list of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {index + 1} is a JSON {type(row).__name__}; expected an object")
    return Rows(str(file), (column for row in rows for column in row), _digest(content), rows)


def _parquet_rows(file: Path) -> Rows:
    library = _datasets()
    try:
        table = library.Dataset.from_parquet(str(file))
    except (OSError, ValueError, library.exceptions.DatasetGenerationError) as error:
        cause = one_line(error.__cause__ or error)
        raise DataError(f"{file} cannot be read as Parquet, or holds no rows: {cause}") from error
    with file.open("rb") as stream:
        identity = hashlib.file_digest(stream, "blake2b").hexdigest()
    return Rows(str(file), table.column_names, identity, table, columnar=True)


def _hub_rows(path: str, split: str, name: str | None) -> Rows:
    library = _datasets()
    where = f"{path} (split {split})" if name is None else f"{path} ({name}, split {split})"
    try:
        table = library.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{where} is neither a local file nor a data set on the Hub: {one_line(error)}") from error
    return Rows(where, table.column_names, str(table._fingerprint), table, columnar=True)


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet files and the Hub are read with the datasets package; pip install 'deltatune[train]'"
        ) from error
    return datasets


class _ManyRows(Rows):
    """Several files, one after the other, up to a number of rows."""

    def __init__(self, name: str, parts: Sequence[Rows], total: int) -> None:
        columns = (column for part in parts for column in part.columns)
        identity = _digest(f"{[part.identity for part in parts]}:{total}".encode())
        super().__init__(name, columns, identity, range(total), columnar=any(part.columnar for part in parts))
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        end = min(end, len(self))
        for part, first in zip(self._parts, self._starts, strict=False):
            if start < first + len(part) and end > first:
                yield from part.read(max(0, start - first), end - first)

    def where(self, index: int) -> str:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part].where(index - self._starts[part])


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
