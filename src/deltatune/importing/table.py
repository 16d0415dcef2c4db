"""The table of an import: a line for every key, and their number by verdict."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, get_args

from deltatune.config.explain import shown
from deltatune.importing.rules import Row, Verdict
from deltatune.importing.values import NotLiteral

__all__ = ["table_lines"]

_HEAD: Final = ("key", "value", "", "here", "why")
_VALUE_WIDTH: Final = 28
#: Cells beyond it push what follows to the right, in their row alone.
_WIDEST: Final = 60


def table_lines(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """A line per row, columns one below the other; the last line counts.

    Where a line would be wider than ``width`` columns, rows are paragraphs of that width instead.
    """
    number = Counter(row.outcome.verdict for row in rows if row.given)
    counts = ", ".join(f"{number[verdict]} {verdict}" for verdict in get_args(Verdict))
    last = f"{number.total()} keys: {counts}"
    lines = _in_columns(rows)
    if width is None or max(map(len, lines)) <= width:
        return [*lines, "", last]
    paragraphs = [line for row in rows for line in _paragraph(row, width)]
    return [*paragraphs, "", *textwrap.wrap(last, width)]


def _in_columns(rows: Sequence[Row]) -> list[str]:
    cells = [_HEAD, *map(_cells, rows)]
    widths = [min(_WIDEST, max(len(row[column]) for row in cells)) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in cells
    ]
    return [line.rstrip() for line in lines]


def _paragraph(row: Row, width: int) -> list[str]:
    """What is there, and below it what it becomes here and why."""
    key, value, verdict, ours, why = _cells(row)
    found = textwrap.wrap(f"{key}: {value} ({verdict})", width, subsequent_indent="  ")
    for cell in filter(None, (ours, why)):
        found += textwrap.wrap(cell, width, initial_indent="  ", subsequent_indent="  ")
    return found


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    ours = ", ".join(f"{key}: {_short(value)}" if value != {} else key for key, value in row.outcome.writes.items())
    key = row.key if row.given else f"({row.key})"
    return key, _short(row.value), row.outcome.verdict, ours, row.outcome.why


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, NotLiteral) else value if isinstance(value, str) else shown(value)
    text = " ".join(text.split())
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 3]}..."
