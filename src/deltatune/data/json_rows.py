"""Rows of JSON and text files: an index of where each begins; they are read in any order and stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deltatune.data.encoding import check_encoding, decode
from deltatune.data.json_values import unreadable
from deltatune.data.rows import BadRowError, Rows, digest, read_on
from deltatune.data.unpacked import open_data
from deltatune.errors import DataError

__all__ = ["ROWS_FOR_COLUMNS", "json_file", "json_lines", "text_lines"]

#: Rows whose keys are the columns of a file; what follows is parsed when it is read.
ROWS_FOR_COLUMNS = 1000
_PER_LINE = "expected one JSON object per line"
_A_LIST = "expected a list of objects"
_BLANK = re.compile(r"[ \t\r\n]*")
_JSON_NAMES = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}

Parse = Callable[[bytes, str], dict[str, Any]]


@dataclass
class _Index:
    """Where the rows of a file begin, and the numbers that errors give them: 16 bytes a row."""

    stamp: tuple[int, int]  # size and time of the file: offsets hold for this state of it alone
    identity: str = ""
    starts: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("q"))
    end: int = 0  # of the last row

    def add(self, start: int, end: int, number: int) -> None:
        self.starts.append(start)
        self.numbers.append(number)
        self.end = end


class _Records(Rows):
    """Stretches of a file, each of them a row that is parsed when it is read."""

    def __init__(self, file: Path, name: str, index: _Index, parse: Parse, unit: str, columnar: bool = False) -> None:
        self._file, self._stamp, self._parse, self._unit, self.columnar = file, index.stamp, parse, unit, columnar
        index.starts.append(index.end)
        self._starts: NDArray[np.int64] = np.frombuffer(index.starts, dtype=np.int64)
        self._numbers: NDArray[np.int64] = np.frombuffer(index.numbers, dtype=np.int64)
        super().__init__(name, (), index.identity, len(index.numbers))
        first = [row for _, row in read_on(self.read, 0, min(ROWS_FOR_COLUMNS, len(self)))]
        broken = [row for row in first if isinstance(row, BadRowError)]
        if len(broken) == len(first):
            raise broken[0]
        self.columns = tuple(dict.fromkeys(key for row in first if not isinstance(row, BadRowError) for key in row))

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        end = min(end, len(self))
        with open_data(self._file) as stream:
            if _stamp(stream) != self._stamp:
                raise DataError(f"{self.name} has changed since it was opened; start again")
            stream.seek(int(self._starts[min(start, end)]))
            for index in range(start, end):
                content = stream.read(int(self._starts[index + 1] - self._starts[index]))
                try:
                    row = self._parse(content, self.where(index))
                except DataError as error:
                    raise BadRowError(str(error)) from error
                yield row

    def where(self, index: int) -> str:
        return f"{self.name}, {self._unit} {self._numbers[index]}"


def json_lines(file: Path, name: str, *, limit: int | None = None, unit: str = "line", columnar: bool = False) -> Rows:
    """Rows of a file with one JSON object per line; blank lines are passed over, and nothing after ``limit`` rows read.

    Args:
        file: what is read.
        name: what errors call it.
        limit: use the first so many rows.
        unit, columnar: for lines that were made of a table: what errors call a line, and that no row lacks a column.
    """
    return _Records(file, name, _index_lines(file, name, "", limit), _parse_line, unit, columnar)


def text_lines(file: Path, name: str, *, limit: int | None = None) -> Rows:
    """Rows ``{"text": line}`` of a text file; blank lines are passed over."""
    return _Records(file, name, _index_lines(file, name, "text", limit), _parse_text, "line")


def json_file(file: Path, name: str, *, limit: int | None = None) -> Rows:
    """Rows of a file that is one list of objects, or that holds an object per line after all."""
    with open_data(file) as stream:
        index, content = _Index(_stamp(stream)), stream.read()
    check_encoding(content, name)
    text = decode(content, name)
    if text.lstrip().startswith("{"):
        _check_not_one_object(text, name)
        return json_lines(file, name, limit=limit)
    # positions in the text, which begins after a byte order mark, to positions in the file
    at, position = len(content) - len(text.encode()), 0
    for number, (start, end) in enumerate(_elements(text, name), start=1):
        first = at + start - position  # what separates elements is ASCII
        at, position = first + len(text[start:end].encode()), end
        index.add(first, at, number)
        if number == limit:
            break
    if not index.numbers:
        raise DataError(f"{name} holds no rows; expected at least one")
    index.identity = digest(b"list" + content[: index.end])
    return _Records(file, name, index, _parse_element, "row")


def _index_lines(file: Path, name: str, kind: str, limit: int | None) -> _Index:
    content = hashlib.blake2b(kind.encode(), digest_size=16)
    offset = 0
    with open_data(file) as stream:
        index = _Index(_stamp(stream))
        for number, line in enumerate(stream, start=1):
            if number == 1:
                check_encoding(line, name)
            content.update(line)
            end = offset + len(line)
            if line.strip():
                index.add(offset, end, number)
                if len(index.numbers) == limit:
                    break
            offset = end
    if not index.numbers:
        raise DataError(f"{name} holds blank lines only; expected at least one row")
    index.identity = content.hexdigest()
    return index


def _elements(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Where the objects in a JSON list begin and end."""
    decoder, number = json.JSONDecoder(), 0
    at = _skip_blank(text, 0)
    try:
        if text[at : at + 1] != "[":
            raise DataError(f"{name} is a JSON {_json_name(json.loads(text))}; {_A_LIST}")
        at = _skip_blank(text, at + 1)
        closed = text[at : at + 1] == "]"
        while not closed:
            row, end = decoder.raw_decode(text, at)
            number += 1
            if not isinstance(row, dict):
                raise DataError(f"{name}, row {number} is a JSON {_json_name(row)}; expected an object")
            yield at, end
            at = _skip_blank(text, end)
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = at if closed else _skip_blank(text, at + 1)
        if _skip_blank(text, at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except (ValueError, RecursionError) as error:
        raise _json_error(error, name, _A_LIST) from None


def _check_not_one_object(text: str, name: str) -> None:
    """One object over the whole file is no row but a wrapping: which of its values are the rows, its owner knows."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return  # lines, or broken ones: the first of them is named when lines are read
    keys = ", ".join(whole) or "none"
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    remedy = f"; save the list under {lists[0]} as a file of its own" if len(lists) == 1 else ""
    raise DataError(f"{name} is one JSON object with the keys {keys}; {_A_LIST}{remedy}")


def _parse_line(content: bytes, where: str) -> dict[str, Any]:
    text = decode(content.strip(), where)
    if text.startswith("["):
        raise DataError(f"{where} begins a JSON list; {_PER_LINE} (a list of objects belongs in a .json file)")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(error, where, _PER_LINE) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {_json_name(row)}; {_PER_LINE}")
    return row


def _parse_element(content: bytes, where: str) -> dict[str, Any]:
    # an object ends in a brace; what follows it separates it from the next
    return _parse_line(content.rstrip(b", \t\r\n]"), where)


def _parse_text(content: bytes, where: str) -> dict[str, Any]:
    return {"text": decode(content.partition(b"\n")[0].removesuffix(b"\r"), where)}


def _json_error(error: ValueError | RecursionError, where: str, expected: str) -> DataError:
    if isinstance(error, DataError):
        return error
    if isinstance(error, json.JSONDecodeError):
        line = f", line {error.lineno}" if error.doc.count("\n") else ""
        return DataError(f"{where}{line} is not valid JSON: {error.msg} at column {error.colno}; {expected}")
    return DataError(f"{where}: {unreadable(error)}")


def _json_name(value: Any) -> str:
    return _JSON_NAMES.get(type(value), "null")


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _stamp(stream: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns
