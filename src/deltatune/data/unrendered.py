"""What a row holds and the chat template leaves out: keys that it does not read, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.notes import Notes
from deltatune.data.template import ChatTemplate, RenderError
from deltatune.errors import DataError

__all__ = ["REASONING_KEYS", "UnreadKeys", "check_calls"]

# tool_call_id says which call a result answers; few templates write it, and nothing is lost
_NEVER_NOTED = ("role", "content", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class UnreadKeys:
    """Which keys of a message a template reads, found once for each role and key by rendering without the key."""

    def __init__(self, template: ChatTemplate, *, reasoning_is_read: bool) -> None:
        self._template = template
        self._never_noted = (*_NEVER_NOTED, *(REASONING_KEYS if reasoning_is_read else ()))
        self._is_read: dict[tuple[str, str], bool] = {}

    def note(self, messages: Sequence[Message], tools: list[Any] | None, where: str, notes: Notes) -> None:
        """Notes, once for each row, the keys that change nothing in what is rendered."""
        unread = set()
        for index, message in enumerate(messages):
            for key, value in message.items():
                if not value or key in self._never_noted:
                    continue
                kind = (message["role"], key)
                if kind not in self._is_read:
                    self._is_read[kind] = self._reads(messages[: index + 1], key, tools)
                if not self._is_read[kind]:
                    unread.add(kind)
        for role, key in sorted(unread):
            lost = "; that reasoning does not train" if role == "assistant" and key in REASONING_KEYS else ""
            notes.add(f"the chat template does not read {key!r} of {role} messages{lost}", where)

    def _reads(self, messages: Sequence[Message], key: str, tools: list[Any] | None) -> bool:
        *before, last = messages
        without = {name: value for name, value in last.items() if name != key}
        try:
            return self._template.render(messages, tools) != self._template.render([*before, without], tools)
        except RenderError:
            return True


def check_calls(calls: Sequence[Any], text: str, where: str) -> None:
    """Raises a ``DataError`` where a trained turn's text holds none of a tool call's arguments, or of one without any
    not the name.
    """
    for number, call in enumerate(calls):
        function = call.get("function", call)
        name, values = str(function.get("name", "")), list(_leaves(function.get("arguments")))
        if any(_holds(text, value) for value in values) if values else name in text:
            continue
        what = f"the arguments of tool call {number} ({name})" if name in text else f"tool call {number} ({name})"
        raise DataError(
            f"{where}: the chat template does not render {what}, so the turn would train without it; use a template "
            "that renders tool_calls (model.chat_template), or write the call into content"
        )


def _leaves(value: Any) -> Iterator[Any]:
    """The strings, numbers and truth values within arguments."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value not in (None, ""):
        yield value


def _holds(text: str, value: Any) -> bool:
    if isinstance(value, str):
        value = value.strip()
        quoted = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        return any(form in text for form in (value, *quoted, repr(value)[1:-1]))
    return json.dumps(value) in text.lower() or str(value) in text
