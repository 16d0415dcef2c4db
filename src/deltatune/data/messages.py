"""What a row holds, checked and brought to one shape: a conversation, a prompt with its completion, or a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deltatune.errors import DataError, nearest

__all__ = ["ROLES", "Conversation", "Format", "Layout", "read_conversation", "read_text", "resolve_format"]

Format = Literal["chat", "prompt_completion", "text"]
Message = dict[str, Any]
Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# the names of the ShareGPT format: {"from": "human", "value": "..."}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

_REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: Format  # chat (a list of messages), prompt_completion (strings or lists of messages) or text
    columns: Mapping[str, str] = field(default_factory=dict)  # other names for the columns that the formats read

    def column(self, role: str) -> str:
        """The name of the column that plays this role."""
        return self.columns.get(role, role)


@dataclass(frozen=True)
class Conversation:
    """Messages ready for a chat template."""

    messages: list[Message]  # checked; keys whose value is None are left out
    tools: list[Any] | None = None  # JSON schemas for the template
    num_prompt: int = 0  # messages at the front that belong to a prompt and never train
    trains: tuple[bool | None, ...] = ()  # what the row says of each message; None or nothing: as train_on says


def resolve_format(
    requested: Format | Literal["auto"], columns: Iterable[str], renamed: Mapping[str, str], where: str
) -> Layout:
    """The layout of a source with these columns; ``auto`` takes the first format whose columns are all there.

    Raises:
        DataError: no format fits, or the requested one lacks a column.
    """
    names = set(columns)
    renamed = dict(renamed)
    if "messages" not in renamed and "messages" not in names and "conversations" in names:
        renamed["messages"] = "conversations"
    found = ", ".join(sorted(names)) or "none"
    for role, name in renamed.items():
        if name not in names:
            raise DataError(f"{where} has no column {name!r} for {role}{nearest(name, names)}; its columns: {found}")
    for candidate, roles in _REQUIRED.items():
        missing = [name for role in roles if (name := renamed.get(role, role)) not in names]
        if requested == candidate and missing:
            raise DataError(
                f"{where} has no column {missing[0]!r}{nearest(missing[0], names)}, which format {candidate} needs; "
                f"its columns: {found}; name the right one under columns, or choose another format"
            )
        if requested in (candidate, "auto") and not missing:
            return Layout(candidate, renamed)
    raise DataError(
        f"{where} fits no format: expected the columns messages, or prompt and completion, or text; got {found}; "
        "name them under columns, as in {messages: dialogue}"
    )


def read_conversation(row: Row, layout: Layout, where: str) -> Conversation:
    """The messages and tools of a chat row, or of a prompt/completion row that holds messages.

    A string prompt with a list of messages is a user turn, a string completion an assistant turn.

    Raises:
        DataError: no messages, an unknown role, a message without content, tools that are no list.
    """
    tools = _read_tools(row.get(layout.column("tools")), where)
    if layout.format == "chat":
        column = layout.column("messages")
        return Conversation(_read_messages(_value(row, column, where), column, where), tools)
    parts = []
    for role, speaker in (("prompt", "user"), ("completion", "assistant")):
        column = layout.column(role)
        value = _value(row, column, where)
        turns = [{"role": speaker, "content": value}] if isinstance(value, str) else value
        parts.append(_read_messages(turns, column, where))
    return Conversation(parts[0] + parts[1], tools, num_prompt=len(parts[0]))


def read_text(row: Row, column: str, where: str, *, allow_empty: bool = False) -> str:
    """The string in a column.

    Raises:
        DataError: no such column in this row, not a string, or an empty one.
    """
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} must be a string, got {_shown(value)}")
    if not value and not allow_empty:
        raise DataError(f"{where}: {column} is empty, so nothing would train; remove the row")
    return value


def _value(row: Row, column: str, where: str) -> Any:
    value = row.get(column)
    if value is None:
        present = ", ".join(sorted(str(name) for name, given in row.items() if given is not None)) or "nothing"
        raise DataError(f"{where} has no {column}{nearest(column, map(str, row))}; it holds {present}")
    return value


def _read_messages(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: {column} must be a list of messages, got {_shown(value)}")
    if not value:
        raise DataError(f"{where}: {column} is empty; expected a user and an assistant turn, or remove the row")
    return [_read_message(message, f"{where}: {column}[{index}]") for index, message in enumerate(value)]


def _read_message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with role and content, got {_shown(value)}")
    message: Message = _plain(value)
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        message["role"] = _SHAREGPT_ROLES.get(speaker, speaker)
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if role is None:
        raise DataError(f"{where} has no role; expected one of {', '.join(ROLES)}")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise DataError(f"{where} has the unknown role {role!r}{hint}; expected one of {', '.join(ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _read_tool_calls(message["tool_calls"], where)
    if "content" not in message:
        if role != "assistant" or not message.get("tool_calls"):
            raise DataError(f"{where} ({role}) has no content; add it, or remove the message")
        message["content"] = ""
    _check_content(message["content"], where)
    return message


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be a string or a list of text parts, got {_shown(content)}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: only text parts can be trained on, expected {{'type': 'text', 'text': '...'}}, "
                f"got {_shown(part)}"
            )


def _read_tool_calls(calls: Any, where: str) -> list[Any]:
    """Arguments that came as a JSON string become objects, which templates iterate over."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError(f"{where}: tool_calls must be a list, got {_shown(calls)}")
    read = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise DataError(f"{where}: a tool call must be an object, got {_shown(call)}")
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _parse(function["arguments"], f"{where}: the arguments of a tool call")
            call = {**call, "function": {**function, "arguments": arguments}}
        read.append(call)
    return read


def _read_tools(value: Any, where: str) -> list[Any] | None:
    """Tools may come as a list or as JSON text, which keeps differing schemas out of a Parquet column's type."""
    if value is None:
        return None
    if isinstance(value, str):
        value = _parse(value, f"{where}: tools")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{where}: tools must be a list of JSON schemas, got {_shown(value)}")
    return [_plain(tool) for tool in value] or None


def _plain(value: Any) -> Any:
    """Columnar files fill absent keys with ``None``, which templates would print."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} are not JSON: {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
