"""The forms in which a chat template takes messages: text or parts, and tool calls beside which content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.probes import PROBE, PROBE_CALL, Probes, as_parts

__all__ = ["MessageForms"]


class MessageForms:
    """Brings messages to the form that a template renders, which small conversations tell.

    A template may print a list of parts as Python, or take the characters of a string for parts; it may add a call's
    arguments to a string, or render calls only beside content that is null. What it renders as it came stays as it is.
    """

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._takes_parts: dict[str, bool] = {}

    def convert(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them; those that change are copies."""
        return [self._convert(message) for message in messages]

    def _convert(self, message: Message) -> Message:
        content, calls = message.get("content"), message.get("tool_calls")
        if calls and not content:
            empty, as_text = self._call_form[content]
            return {**message, "content": empty, "tool_calls": _with_arguments(calls, as_text=as_text)}
        if calls:
            message = {**message, "tool_calls": _with_arguments(calls, as_text=self._call_form[None][1])}
        if content is None:
            return {**message, "content": ""}
        if isinstance(content, str) and content.lstrip().startswith("<think>") and self._repeats_reasoning:
            message = _with_reasoning_apart(message)
            content = message["content"]
        if isinstance(content, str):
            wants_parts = content and self._probes.wants_parts(message["role"])
            return {**message, "content": as_parts(content)} if wants_parts else message
        if self._reads_parts(message["role"]):
            return message
        return {**message, "content": "".join(part["text"] for part in content)}

    def _reads_parts(self, role: str) -> bool:
        if role not in self._takes_parts:
            self._takes_parts[role] = self._probes.shows(role, as_parts(PROBE))
        return self._takes_parts[role]

    @cached_property
    def _repeats_reasoning(self) -> bool:
        """Whether the template writes a reasoning of its own, empty, before one that the content begins with."""
        question = self._probes.message("user", "zqvquestion")
        answer = {"role": "assistant", "content": f"<think>\nzqvreason\n</think>\n\n{PROBE}"}
        within = self._probes.render(question, answer) or ""
        apart = self._probes.render(question, _with_reasoning_apart(answer)) or ""
        return within.count("</think>") == 2 and apart.count("</think>") == 1 and "zqvreason" in apart

    @cached_property
    def _call_form(self) -> dict[str | None, tuple[str | None, bool]]:
        """Content that came -> the empty content that calls are rendered beside, and whether arguments are JSON."""
        texts = {(empty, as_text): self._calls(empty, as_text) for empty in (None, "") for as_text in (False, True)}
        # null that is printed is told by the same call beside empty text
        named = {
            form: text
            for form, text in texts.items()
            if text and PROBE in text and text.count("None") <= (texts["", form[1]] or text).count("None")
        }
        good = [form for form, text in named.items() if _shows_arguments(text)] or list(named)
        # content stays as it came where calls are shown beside it
        return {came: min(good, key=lambda form: form[0] != came, default=("", False)) for came in (None, "")}

    def _calls(self, empty: str | None, as_text: bool) -> str | None:
        calls = _with_arguments([PROBE_CALL], as_text=as_text)
        message = {"role": "assistant", "content": empty, "tool_calls": calls}
        return self._probes.render(self._probes.message("user", "zqvquestion"), message)


def _with_reasoning_apart(message: Message) -> Message:
    """The message with what its content has up to ``</think>`` under a key of its own."""
    reasoning, closed, answer = str(message["content"]).partition("</think>")
    if not closed or message.get("reasoning_content") or message["role"] != "assistant":
        return message
    reasoning = reasoning.lstrip().removeprefix("<think>").strip("\n")
    return {**message, "reasoning_content": reasoning, "content": answer.lstrip("\n")}


def _with_arguments(calls: Sequence[Any], *, as_text: bool) -> list[Any]:
    """Calls whose arguments are JSON text, or objects."""
    return [_with_argument_form(call, as_text=as_text) for call in calls]


def _with_argument_form(call: Any, *, as_text: bool) -> Any:
    if "function" in call and isinstance(call["function"], dict):
        return {**call, "function": _with_argument_form(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if arguments is None or isinstance(arguments, str) == as_text:
        return call
    if as_text:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    try:
        return {**call, "arguments": json.loads(arguments)}
    except (json.JSONDecodeError, RecursionError):
        return call


def _shows_arguments(text: str) -> bool:
    """Whether a rendering holds the probe's arguments, neither as Python nor quoted once more."""
    return "zqvkey" in text and "zqvvalue" in text and "{'zqvkey'" not in text and '\\"zqvkey' not in text
