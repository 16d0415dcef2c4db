"""Rows of CSV and TSV files, whose fields are text: a column of digits stays as it is written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from deltatune.data.encoding import check_encoding, decode
from deltatune.data.json_rows import json_lines
from deltatune.data.rows import Rows
from deltatune.data.unpacked import file_digest, made_once, open_data
from deltatune.errors import DataError

__all__ = ["delimited_rows"]


def delimited_rows(file: Path, name: str, delimiter: str, cache_dir: Path, *, limit: int | None = None) -> Rows:
    """Rows of a file whose first line names the columns, as objects of strings.

    A field may hold line breaks, so where a row begins is known only from the start: the rows are written to the cache
    once, as JSON lines.

    Args:
        file: what is read.
        name: what errors call it.
        delimiter: stands between fields.
        cache_dir: keeps the rows, under the digest of the file.
        limit: use the first so many rows.

    Raises:
        DataError: a row with more or fewer fields than the header, broken quotes; its line is named.
    """

    def convert(target: IO[bytes]) -> None:
        with open_data(file) as stream:
            for row in islice(_rows(stream, name, delimiter), limit):
                target.write(json.dumps(row).encode() + b"\n")

    made = made_once(cache_dir, f"{file_digest(file)}-{ord(delimiter)}-{limit}", convert)
    if made.stat().st_size == 0:
        raise DataError(f"{name} holds no rows below its header; expected at least one")
    return json_lines(made, name, limit=limit, unit="row", columnar=True)


def _rows(stream: IO[bytes], name: str, delimiter: str) -> Iterator[dict[str, str]]:
    lines = csv.reader(_text(stream, name), delimiter=delimiter, strict=True)
    try:
        with _long_fields():
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise DataError(f"{name}, line 1 names a column twice: {', '.join(header)}; give each its own name")
            for fields in lines:
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                elif fields:  # a blank line has none
                    where = f"{name}, line {lines.line_num}"
                    raise DataError(f"{where} ends a row of {len(fields)} fields; expected {', '.join(header)}")
    except csv.Error as error:
        raise DataError(f"{name}, line {lines.line_num} is no valid CSV: {error}; check its quotes") from error


def _text(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            check_encoding(line, name)
        yield decode(line, f"{name}, line {number}")


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit on a field is the process's; documents are longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
