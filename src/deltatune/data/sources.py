"""Rows of JSONL, JSON and Parquet files, and of data sets on the Hub, each row with a name for errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deltatune.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["Rows", "load_rows"]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Rows(Protocol):
    """Rows that can be read in any order, and by several processes.

    Attributes:
        name: the source as the user wrote it.
        columns: the names of its columns.
        identity: a digest of the content, equal for equal rows.
    """

    name: str
    columns: tuple[str, ...]
    identity: str

    def __len__(self) -> int: ...

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows ``start`` to ``end``."""
        ...

    def where(self, index: int) -> str:
        """The place of a row in words: file and line, or data set and row."""
        ...


def load_rows(path: str, *, split: str = "train", name: str | None = None, limit: int | None = None) -> Rows:
    """Opens a file, a pattern of files, a folder of files, or a data set on the Hub.

    JSON files are checked line by line here and stay as they are: no common schema is forced on their rows. Parquet
    files and the Hub are read through the ``datasets`` library.

    Args:
        path: ``*.jsonl``, ``*.ndjson``, ``*.json`` (a list of objects), ``*.parquet``, or a name on the Hub.
        split: of a data set on the Hub.
        name: configuration of a data set on the Hub.
        limit: use the first so many rows only.

    Raises:
        DataError: nothing there (near names are given), a file that is empty or broken (its line is given), no row.
    """
    files = _local_files(path)
    if files is None:
        rows: Rows = _hub_rows(path, split, name)
    else:
        parts = [_file_rows(file) for file in files]
        rows = parts[0] if len(parts) == 1 else _ManyRows(path, parts)
    if limit is not None and limit < len(rows):
        rows = _FirstRows(rows, limit)
    if len(rows) == 0:
        raise DataError(f"{path} holds no rows; expected at least one")
    return rows


def _local_files(path: str) -> list[Path] | None:
    """The files that a path stands for; ``None`` for a name on the Hub."""
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in _SUFFIXES:
            raise DataError(
                f"{path} is no data file: expected {', '.join(_SUFFIXES)}, got {local.suffix or 'no suffix'}"
            )
        return [local]
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} holds no data files; expected {', '.join(_SUFFIXES)}")
        return files
    if any(character in path for character in "*?["):
        anchor = Path(local.anchor) if local.is_absolute() else Path()
        files = sorted(file for file in anchor.glob(str(local.relative_to(anchor))) if file.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path} matches no data file; expected {', '.join(_SUFFIXES)}")
        return files
    if local.suffix in _SUFFIXES or path.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{path} does not exist{_near_names(local)}")
    return None


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {folder.resolve()} holds nothing of a like name"


def _file_rows(file: Path) -> Rows:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; expected at least one row")
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    return _JsonRows(file) if file.suffix == ".json" else _JsonLines(file)


class _JsonLines:
    """One object per line; blank lines are passed over. Lines are found once and parsed when they are read."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        self._file = file
        columns: dict[str, None] = {}
        offsets, lines = [], []
        digest, offset = hashlib.blake2b(digest_size=16), 0
        with file.open("rb") as stream:
            for line, content in enumerate(stream, start=1):
                digest.update(content)
                if content.strip():
                    columns |= dict.fromkeys(_parse_line(content, f"{file}, line {line}"))
                    offsets.append(offset)
                    lines.append(line)
                offset += len(content)
        if not lines:
            raise DataError(f"{file} holds blank lines only; expected one JSON object per line")
        self._offsets, self._lines = np.array(offsets), np.array(lines)
        self.columns = tuple(columns)
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return self._lines.size

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        with self._file.open("rb") as stream:
            for index in range(start, min(end, len(self))):
                stream.seek(int(self._offsets[index]))
                yield _parse_line(stream.readline(), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.name}, line {self._lines[index]}"


def _parse_line(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(content.decode("utf-8-sig").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}; expected one JSON object per line"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}; expected one JSON object per line")
    return row


class _JsonRows:
    """A file that holds one list of objects."""

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        content = file.read_bytes()
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}; expected a list "
                "of objects (one object per line belongs in a .jsonl file)"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
        if not isinstance(rows, list):
            raise DataError(f"{file} is a JSON {type(rows).__name__}; expected a list of objects")
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(f"{file}, row {index + 1} is a JSON {type(row).__name__}; expected an object")
        self._rows: list[dict[str, Any]] = rows
        self.columns = tuple(dict.fromkeys(column for row in rows for column in row))
        self.identity = hashlib.blake2b(content, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        return iter(self._rows[start:end])

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


class _TableRows:
    """A ``datasets.Dataset``: memory-mapped columns."""

    def __init__(self, name: str, table: datasets.Dataset, identity: str) -> None:
        self.name = name
        self._table = table
        self.columns = tuple(table.column_names)
        self.identity = identity

    def __len__(self) -> int:
        return len(self._table)

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        for index in range(start, min(end, len(self))):
            yield self._table[index]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def _parquet_rows(file: Path) -> _TableRows:
    library = _datasets()
    try:
        table = library.Dataset.from_parquet(str(file))
    except (OSError, ValueError, library.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{file} cannot be read as Parquet, or holds no rows: {' '.join(str(cause).split())}"
        ) from error
    with file.open("rb") as stream:
        identity = hashlib.file_digest(stream, "blake2b").hexdigest()
    return _TableRows(str(file), table, identity)


def _hub_rows(path: str, split: str, name: str | None) -> _TableRows:
    library = _datasets()
    where = f"{path} (split {split})" if name is None else f"{path} ({name}, split {split})"
    try:
        table = library.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} is neither a local file nor a data set on the Hub: {reason}") from error
    return _TableRows(where, table, str(table._fingerprint))


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet files and the Hub are read with the datasets package; pip install 'deltatune[train]'"
        ) from error
    return datasets


class _ManyRows:
    """Several files, one after the other."""

    def __init__(self, name: str, parts: Sequence[Rows]) -> None:
        self.name = name
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()
        self.columns = tuple(dict.fromkeys(column for part in parts for column in part.columns))
        self.identity = hashlib.blake2b("".join(part.identity for part in parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        for part, first in zip(self._parts, self._starts, strict=False):
            if start < first + len(part) and end > first:
                yield from part.read(max(0, start - first), end - first)

    def where(self, index: int) -> str:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part].where(index - self._starts[part])


class _FirstRows:
    """The first rows of others."""

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows = rows
        self._limit = limit
        self.name, self.columns = rows.name, rows.columns
        self.identity = f"{rows.identity}:{limit}"

    def __len__(self) -> int:
        return self._limit

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        return self._rows.read(start, min(end, self._limit))

    def where(self, index: int) -> str:
        return self._rows.where(index)
