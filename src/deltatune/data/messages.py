"""What a row holds, checked and brought to one shape: a conversation, or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.config.row_formats import ROLES, columns_of
from deltatune.data.formats import Format, Layout, Row
from deltatune.data.json_values import drop_nulls, holds_null, parse_json, shown
from deltatune.data.notes import Notes
from deltatune.data.tools import read_tools
from deltatune.data.turns import Message, read_turn
from deltatune.errors import DataError, nearest

__all__ = [
    "ROLES",
    "Conversation",
    "Format",
    "Layout",
    "Message",
    "Row",
    "Turns",
    "read_asked",
    "read_conversation",
    "read_text",
    "read_turns",
    "with_system",
    "without_filled_keys",
]

Marks = tuple[bool | None, ...]

_SPEAKERS = ("user", "assistant")

_NULLS_DROPPED = (
    "nulls inside the arguments and schemas of tools were taken for absent keys, which files with one schema for all "
    "rows fill with null; keep arguments and tools as JSON text where a null means something"
)


@dataclass(frozen=True)
class Conversation:
    """Messages ready for a chat template."""

    messages: list[Message]  # checked; keys that are null are left out, but the content of a turn that calls is None
    tools: list[Any] | None = None  # JSON schemas for the template
    num_prompt: int = 0  # messages at the front that belong to a prompt and never train
    trains: Marks = ()  # what the row says of each message; None or nothing: as train_on says


@dataclass(frozen=True)
class Turns:
    """Messages, and what the row says of the training of each."""

    messages: list[Message]
    marks: Marks

    def __add__(self, later: Turns) -> Turns:
        return Turns(self.messages + later.messages, self.marks + later.marks)

    def __getitem__(self, part: slice) -> Turns:
        return Turns(self.messages[part], self.marks[part])


def read_conversation(row: Row, layout: Layout, where: str, notes: Notes | None = None) -> Conversation:
    """The messages and tools of a row of format chat, alpaca, or prompt_completion where that holds messages.

    A string prompt with a list of messages is a user turn, a string completion an assistant turn. Alpaca's question is
    ``instruction``, a line break and ``input``, or ``instruction`` alone where there is no input; pairs in ``history``
    come before it. A ``system`` column is the first message. ``notes`` takes what is no error.

    Lists of messages and of pairs may come as JSON text.

    Raises:
        DataError: no messages, an unknown role, a message without content, tools that are no list, two system prompts.
    """
    if layout.columnar:
        row = without_filled_keys(row, layout, where, notes)
    tools = read_tools(row, layout, where)
    if layout.format == "prompt_completion":
        prompt, completion = (
            read_turns(_value(row, column, where), column, layout, where, speaker)
            for column, speaker in zip(map(layout.column, ("prompt", "completion")), _SPEAKERS, strict=True)
        )
        turns = prompt + completion
        return Conversation(turns.messages, tools, len(prompt.messages), turns.marks)
    if layout.format == "alpaca":
        answer = read_text(row, layout.column("output"), where)
        turns = _asked(row, layout, where) + read_turns(answer, "output", layout, where, "assistant")
    else:
        column = layout.column("messages")
        value = _from_text(_value(row, column, where), f"{where}: {column}")
        turns = _read_messages(value, column, layout, where)
    turns = with_system(turns, row, layout, where)
    return Conversation(turns.messages, tools, trains=turns.marks)


def read_turns(value: Any, column: str, layout: Layout, where: str, speaker: str) -> Turns:
    """The messages in a column; a string is one of ``speaker``.

    Raises:
        DataError: neither, no message, or one that cannot be read.
    """
    if isinstance(value, str):
        return Turns([{"role": speaker, "content": value}], (None,))
    return _read_messages(value, column, layout, where)


def read_asked(row: Row, layout: Layout, where: str) -> Turns | None:
    """What is asked in the columns of Alpaca, and the pairs before it; ``None`` where the row asks otherwise.

    A column that was named as the instruction is one, also beside a ``prompt``.

    Raises:
        DataError: an empty question, or pairs that are none.
    """
    prompted = row.get(layout.column("prompt")) is not None and "instruction" not in layout.columns
    if prompted or row.get(layout.column("instruction")) is None:
        return None
    return _asked(row, layout, where)


def with_system(turns: Turns, row: Row, layout: Layout, where: str) -> Turns:
    """The messages with the row's ``system`` before them.

    Raises:
        DataError: it is no string, or they begin with another.
    """
    system = row.get(layout.column("system"))
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where}: {layout.column('system')} must be a string, got {shown(system)}")
    if system and _has_no_system(turns.messages, system, layout.column("system"), where):
        return Turns([{"role": "system", "content": system}], (None,)) + turns
    return turns


def read_text(row: Row, column: str, where: str, *, allow_empty: bool = False) -> str:
    """The string in a column.

    Raises:
        DataError: no such column in this row, not a string, or an empty one.
    """
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} must be a string, got {shown(value)}")
    if not value and not allow_empty:
        raise DataError(f"{where}: {column} is empty, so nothing would train; remove the row")
    return value


def without_filled_keys(row: Row, layout: Layout, where: str, notes: Notes | None) -> Row:
    """A row of a table without the nulls that stand for keys it never had."""
    read = {layout.column(role) for role in columns_of(layout.format)}
    if notes is not None and any(_null_may_count(row[column]) for column in read & set(row)):
        notes.add(_NULLS_DROPPED, where)
    return {name: drop_nulls(value) if name in read else value for name, value in row.items()}


def _null_may_count(value: Any) -> bool:
    """Whether there is a null where one may mean something: in the arguments of a call, in a tool's parameters."""
    if isinstance(value, Mapping):
        inside = (holds_null(value.get(key)) for key in ("arguments", "parameters"))
        return any(inside) or any(map(_null_may_count, value.values()))
    return isinstance(value, list) and any(map(_null_may_count, value))


def _value(row: Row, column: str, where: str) -> Any:
    value = row.get(column)
    if value is None:
        present = ", ".join(sorted(str(name) for name, given in row.items() if given is not None)) or "nothing"
        raise DataError(f"{where} has no {column}{nearest(column, map(str, row))}; it holds {present}")
    return value


def _from_text(value: Any, what: str) -> Any:
    """A list that came as JSON text, as in CSV files; blank text is nothing, and what else came stays."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return parse_json(text, what) if text.startswith("[") else text


def _read_messages(value: Any, column: str, layout: Layout, where: str) -> Turns:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: {column} must be a list of messages, got {shown(value)}")
    if not value:
        raise DataError(f"{where}: {column} is empty; expected a user and an assistant turn, or remove the row")
    turns = [read_turn(message, layout, f"{where}: {column}[{index}]") for index, message in enumerate(value)]
    return Turns([message for message, _ in turns], tuple(trains for _, trains in turns))


def _asked(row: Row, layout: Layout, where: str) -> Turns:
    instruction, given = (layout.column(role) for role in ("instruction", "input"))
    question = read_text(row, instruction, where, allow_empty=True)
    if row.get(given) is not None:
        question = "\n".join(filter(None, (question, read_text(row, given, where, allow_empty=True))))
    if not question:
        raise DataError(f"{where}: {instruction} is empty, so nothing is asked; fill it, or remove the row")
    pairs = _read_history(row.get(layout.column("history")), f"{where}: {layout.column('history')}")
    said = [*(text for pair in pairs for text in pair), question]
    messages = [{"role": _SPEAKERS[index % 2], "content": text} for index, text in enumerate(said)]
    return Turns(messages, (None,) * len(messages))


def _read_history(value: Any, what: str) -> list[Sequence[str]]:
    pairs = _from_text(value, what) or []
    if not isinstance(pairs, list):
        raise DataError(f"{what} must be a list of [question, answer] pairs, got {shown(value)}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{what}[{index}] must be a [question, answer] pair of strings, got {shown(pair)}")
    return list(pairs)


def _has_no_system(messages: list[Message], system: str, column: str, where: str) -> bool:
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return True
    if first["content"] != system:
        raise DataError(
            f"{where} has two system prompts: the column {column} ({shown(system)}) and its first message "
            f"({shown(first['content'])}); keep one"
        )
    return False
