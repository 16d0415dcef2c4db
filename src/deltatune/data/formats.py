"""Which format a source's rows have, and which of its columns that format reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deltatune.config.row_formats import REQUIRED_COLUMNS, Format, columns_of
from deltatune.data.json_values import check_values
from deltatune.errors import DataError, nearest

__all__ = ["Format", "Layout", "Row", "check_row", "resolve_format", "unused_columns"]

Row = Mapping[str, Any]

# one answer, and whether it is liked
_UNPAIRED = ("label", "kto_tag")


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: Format  # preference (two answers), chat (messages), prompt_completion (strings or messages), alpaca, ...
    columns: Mapping[str, str] = field(default_factory=dict)  # other names for the columns that the formats read
    roles: Mapping[str, str] = field(default_factory=dict)  # names of speakers in the file -> roles of the template
    message_fields: Mapping[str, str] = field(default_factory=dict)  # keys of a message -> their names in the file
    columnar: bool = False  # the file has one schema for all rows, so a null may be a key that the row never had
    explicit: bool = False  # the user named the format: marks of preference data are no reason to refuse a row

    def column(self, role: str) -> str:
        """The name of the column that plays this role."""
        return self.columns.get(role, role)


def resolve_format(
    requested: Format | Literal["auto"],
    columns: Iterable[str],
    renamed: Mapping[str, str],
    where: str,
    *,
    roles: Mapping[str, str] | None = None,
    message_fields: Mapping[str, str] | None = None,
    columnar: bool = False,
) -> Layout:
    """The layout of a source with these columns.

    ``auto`` takes the first format whose columns are all there, of those that read every renamed column. ``roles``,
    ``message_fields`` and ``columnar`` go into the layout as they are.

    Raises:
        DataError: no format fits, the requested one lacks a column, or a mask of tokenised rows has a name that is not
            read.
    """
    names = set(columns)
    for role, name in renamed.items():
        if name not in names:
            raise DataError(f"{where} has no column {name!r} for {role}{nearest(name, names)}; {_its_columns(names)}")
    found = dict(renamed)
    if "messages" not in found and "messages" not in names and "conversations" in names:
        found["messages"] = "conversations"
    chosen = _format(requested, names, found, renamed, where)
    if chosen == "preference" and "prompt" not in found and "prompt" not in names:
        asked = found.get("messages", "messages")
        found |= {"prompt": asked} if asked in names else {}
    layout = Layout(chosen, found, dict(roles or {}), dict(message_fields or {}), columnar, requested != "auto")
    others = set(unused_columns(layout, names)) - {"special_tokens_mask"}  # which says nothing of training
    masks = sorted(name for name in others if name.endswith(("mask", "masks")))
    if chosen == "tokens" and masks:
        raise DataError(
            f"{where} has the column {masks[0]!r}, which format tokens does not know; where it says which tokens "
            f"train, name it under columns, as in {{assistant_masks: {masks[0]}}}, otherwise remove it"
        )
    return layout


def _format(
    requested: str, names: set[str], found: Mapping[str, str], renamed: Mapping[str, str], where: str
) -> Format:
    for candidate, required in REQUIRED_COLUMNS.items():
        missing = [name for role in required if (name := found.get(role, role)) not in names]
        if requested == candidate and missing:
            raise DataError(
                f"{where} has no column {missing[0]!r}{nearest(missing[0], names)}, which format {candidate} needs; "
                f"{_its_columns(names)}; name the right one under columns, or choose another format"
            )
        reads_renamed = set(renamed) <= set(columns_of(candidate))
        if requested == candidate or (requested == "auto" and not missing and reads_renamed):
            return candidate
    raise DataError(
        f"{where} fits no format: expected the columns messages, or prompt and completion, or instruction and output, "
        f"or chosen and rejected, or text, or input_ids; got {', '.join(sorted(names)) or 'none'}; "
        "name them under columns, as in {messages: dialogue}"
    )


def _its_columns(names: set[str]) -> str:
    return f"its columns: {', '.join(sorted(names)) or 'none'}"


def unused_columns(layout: Layout, columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that rows of this layout are not read from, in the order given."""
    read = {layout.column(role) for role in columns_of(layout.format)}
    return tuple(column for column in columns if column not in read)


def check_row(row: Row, layout: Layout, where: str) -> None:
    """Refuses rows that no format can train on.

    Raises:
        DataError: text or values that are broken, or an answer that is marked as liked or not (KTO).
    """
    check_values(row, where)
    marked = next((name for name in _UNPAIRED if isinstance(row.get(name), bool)), None)
    if marked is not None and layout.format in ("chat", "prompt_completion", "alpaca") and not layout.explicit:
        raise DataError(
            f"{where} marks its answer as good or bad ({marked}: {str(row[marked]).lower()}), and answers are "
            "held against each other here in pairs alone (chosen and rejected); "
            f"use a trainer for KTO, or set format: {layout.format} to train on every answer, bad ones too"
        )
