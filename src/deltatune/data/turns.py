"""One message of a row: its keys by the template's names, its role, its calls, and whether it trains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deltatune.config.row_formats import KNOWN_ROLES, ROLES
from deltatune.data.formats import Layout
from deltatune.data.json_values import shown
from deltatune.data.tools import calls_in_text, read_calls
from deltatune.errors import DataError, nearest

__all__ = ["REASONING_KEYS", "Message", "is_empty", "read_turn"]

Message = dict[str, Any]

# the keys of the ShareGPT format: {"from": "human", "value": "..."}
_SHAREGPT_FIELDS = {"role": "from", "content": "value"}

_REASONING_TAG = re.compile(r"</?(\w*think\w*|reasoning)>")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# speakers whose text is a call in JSON
_CALLERS = ("function_call", "tool_call")


def read_turn(value: Any, layout: Layout, where: str) -> tuple[Message, bool | None]:
    """A message as a template takes it, and whether the row says that it trains (``None``: nothing is said).

    Keys that are null are left out, except the content of a turn that calls: ``None`` there, as in OpenAI's format.

    Raises:
        DataError: no object, no or an unknown role, content that is no text, calls or marks that cannot be read.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with role and content, got {shown(value)}")
    message = _by_template_names(value, layout.message_fields, where)
    trains = _mark(message, where)
    role, calls_by_text = _role(message, layout, where)
    message["role"] = role
    calls = calls_in_text(message.pop("content", None), where) if calls_by_text else read_calls(message, where)
    message = {key: item for key, item in message.items() if key not in ("tool_calls", "function_call")}
    if calls and role != "assistant":
        raise DataError(f"{where} ({role}) calls a tool, which only assistant turns do; mend its role or its calls")
    if calls:
        message["tool_calls"] = calls
    if "content" in message:
        message["content"] = _read_content(message["content"], where)
    elif role != "assistant":
        raise DataError(f"{where} ({role}) has no content; add it, or remove the message")
    elif not calls:
        raise DataError(f"{where} ({role}) has no content and calls no tool; add one of them, or remove the message")
    else:
        message["content"] = None
    return message, trains


def is_empty(message: Message) -> bool:
    """Whether a message has neither text other than whitespace, nor reasoning, nor calls."""
    content = message.get("content")
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    said = "".join(str(text or "") for text in [*parts, *(message.get(key) for key in REASONING_KEYS)])
    return not message.get("tool_calls") and not _REASONING_TAG.sub("", said).strip()


def _by_template_names(value: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Message:
    message = {key: item for key, item in value.items() if item is not None}
    taken = {}
    for name, given in {**_SHAREGPT_FIELDS, **fields}.items():
        # ShareGPT's names mean something only where the usual ones are not there
        if given in message and (name in fields or name not in message):
            taken[name] = message.pop(given)
    for name in taken:
        if name in message:
            raise DataError(
                f"{where} has both {fields[name]}, which message_fields names as its {name}, and {name}; keep one"
            )
    return {**message, **taken}


def _role(message: Message, layout: Layout, where: str) -> tuple[str, bool]:
    """The role of the template, and whether the message's text is a call."""
    name = message.get("role")
    if name is None:
        raise DataError(
            f"{where} has no role; expected one of {', '.join(ROLES)}; it holds {', '.join(message) or 'nothing'}; "
            "name the key under message_fields, as in {role: speaker}"
        )
    if name in _CALLERS and name not in layout.roles:
        return "assistant", True
    known = {**KNOWN_ROLES, **layout.roles}
    if not isinstance(name, str) or name not in known:
        raise DataError(
            f"{where} has the unknown role {name!r}{nearest(str(name), known)}; expected one of {', '.join(ROLES)}; "
            f"say in data.roles which of them it is, as in {{{name}: assistant}}"
        )
    return known[name], False


def _mark(message: Message, where: str) -> bool | None:
    """What a message says of its own training; the keys that say it are taken out.

    ``train`` and ``training`` are Axolotl's, ``weight`` is OpenAI's and Mistral's.
    """
    for key in ("train_detail", "training_detail"):
        if key in message:
            raise DataError(
                f"{where} has {key}: training parts of a turn is not supported; use train: true or false for the whole "
                "turn, or rows of format tokens, whose labels say it token by token"
            )
    marks = {key: message.pop(key) for key in ("train", "training", "weight") if key in message}
    for key, mark in marks.items():
        as_number = isinstance(mark, int | float) and not isinstance(mark, bool) and mark in (0, 1)
        if not (as_number if key == "weight" else isinstance(mark, bool)):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f"{where}: {key} must be {expected}, got {shown(mark)}")
    said = {bool(mark) for mark in marks.values()}
    if len(said) > 1:
        raise DataError(f"{where}: {' and '.join(marks)} contradict each other; keep one")
    return said.pop() if said else None


def _read_content(content: Any, where: str) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be a string or a list of text parts, got {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            named = f" of type {kind!r}" if kind != "text" and kind is not None else ""
            raise DataError(
                f"{where}: only text parts can be trained on, expected {{'type': 'text', 'text': '...'}}, "
                f"got a part{named}: {shown(part)}"
            )
    return [{key: item for key, item in part.items() if item is not None} for part in content]
