"""What a row holds and the chat template leaves out: keys that it does not read, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.notes import Notes
from deltatune.data.template import ChatTemplate, RenderError
from deltatune.data.turns import REASONING_KEYS
from deltatune.errors import DataError

__all__ = ["UnreadKeys", "check_calls", "drops_answer", "drops_reasoning"]

# tool_call_id says which call a result answers; few templates write it, and nothing is lost
_NEVER_NOTED = ("role", "tool_call_id")


class UnreadKeys:
    """Which keys of a message a template reads, found once for each role and key by rendering without the key."""

    def __init__(self, template: ChatTemplate, *, reasoning_is_read: bool) -> None:
        self._template = template
        self._never_noted = (*_NEVER_NOTED, *(REASONING_KEYS if reasoning_is_read else ()))
        self._is_read: dict[tuple[str, str, bool], bool] = {}

    def note(self, messages: Sequence[Message], tools: list[Any] | None, where: str, notes: Notes) -> None:
        """Notes, once for each row, what changes nothing in what is rendered."""
        unread = set()
        for index, message in enumerate(messages):
            calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
            for key, value in message.items():
                # templates trim: blank text says nothing about the key
                if not value or key in self._never_noted or (isinstance(value, str) and value.isspace()):
                    continue
                kind = (message["role"], key, key == "content" and calls)
                if kind not in self._is_read:
                    self._is_read[kind] = self._reads(messages, index, key, tools)
                if not self._is_read[kind]:
                    unread.add(kind)
        if tools and not self._template.reads("tools"):
            notes.add("the chat template does not read tools", where)
        for role, key, beside_calls in sorted(unread):
            lost = "; that reasoning does not train" if role == "assistant" and key in REASONING_KEYS else ""
            place = " beside tool_calls" if beside_calls else ""
            notes.add(f"the chat template does not read {key!r} of {role} messages{place}{lost}", where)

    def _reads(self, messages: Sequence[Message], index: int, key: str, tools: list[Any] | None) -> bool:
        message = messages[index]
        without = {name: value for name, value in message.items() if name != key}
        if key == "content":
            without[key] = ""
        if message["role"] == "assistant":
            # what a template drops of an earlier answer it may render of the last one
            return self._differ(messages[: index + 1], without, index, tools)
        # a template may render a message only while its answer is still asked for
        answers = [i for i, later in enumerate(messages) if later["role"] == "assistant" and i > index]
        return self._differ(messages, without, index, tools) or bool(
            answers and self._differ(messages[: answers[-1]], without, index, tools, generation_prompt=True)
        )

    def _differ(
        self,
        messages: Sequence[Message],
        other: Message,
        index: int,
        tools: list[Any] | None,
        *,
        generation_prompt: bool = False,
    ) -> bool:
        texts = []
        for shown in (messages[index], other):
            replaced = [*messages[:index], shown, *messages[index + 1 :]]
            try:
                texts.append(self._template.render(replaced, tools, generation_prompt=generation_prompt))
            except RenderError:
                return True
        return texts[0] != texts[1]


def check_calls(calls: Sequence[Any], text: str, where: str) -> None:
    """Raises a ``DataError`` where a trained turn's text holds nothing of a tool call.

    That is none of its arguments; of a call that has none, not its name.
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


def drops_reasoning(content: Any, text: str) -> bool:
    """Whether a trained turn's text lacks the reasoning that its content begins with."""
    if not isinstance(content, str) or "</think>" not in content:
        return False
    return content.partition("</think>")[0].partition("<think>")[2].strip() not in text


def drops_answer(content: Any, text: str) -> bool:
    """Whether a trained turn's text lacks the text that its content ends with, reasoning apart."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    answer = str(content or "").rpartition("</think>")[2].strip()
    return answer not in text


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
