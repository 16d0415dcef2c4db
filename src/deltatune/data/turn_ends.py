"""What ends a turn in a chat template, and so is the last thing that trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.prefix import common_prefix
from deltatune.data.probes import PROBE, PROBE_CALL, Probes
from deltatune.data.template import RenderError, Span

__all__ = ["OPEN_REASONING", "Ending", "TurnEnds"]

# a generation prompt that ends so leaves the reasoning to the model
OPEN_REASONING = re.compile(r"<(\w*think\w*|reasoning)>(\s*)$")


@dataclass(frozen=True)
class Ending:
    """What a template writes after the content of the last message."""

    text: str  # up to and with the token that ends the turn; empty where no such token follows
    tail: str  # whatever comes after that


class TurnEnds:
    """How a template ends turns, found once by rendering small conversations."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self.template = probes.template
        self._endings: dict[str, Ending] = {}
        self._stops: dict[str, str] = {}

    def ending(self, role: str = "assistant") -> Ending:
        """What follows the content of a last message of this role."""
        if role not in self._endings:
            text = self._probes.last(role, self._probes.message(role)["content"]) or ""
            before, found, after = text.rpartition(PROBE)
            if not found:
                self._endings[role] = Ending("", "")
            elif role == "assistant":
                self._endings[role] = self._of_answers(before, after)
            else:
                token = self.ending().text.strip()
                end = after.find(token) + len(token) if token and token in after else self._first_control(after)
                self._endings[role] = Ending(after[:end], after[end:])
        return self._endings[role]

    def _of_answers(self, before: str, after: str) -> Ending:
        # a header or an end of text that closes every conversation is no part of the turn: what ends it is there as
        # well when a question follows
        following = self._before_a_question
        shared = after if following is None else after[: common_prefix(after, following)]
        end = self._first_control(shared)
        if self._ignores_generation_prompt:
            if not end:
                header = common_prefix(after[::-1], before[::-1])
                return Ending("", after[len(after) - header :])
            return Ending(after[:end], after[end:])
        # some end a last turn by a token of its own (<|return|>)
        end = end or self._first_control(after)
        while end and (control := self.template.control.match(shared, end)):
            end = control.end()
        return Ending(after[:end], after[end:] if end else "")

    def _first_control(self, text: str) -> int:
        control = self.template.control.search(text)
        return control.end() if control else 0

    @cached_property
    def _ignores_generation_prompt(self) -> bool:
        question = self._probes.message("user", "zqvquestion")
        return self._probes.render(question) == self._probes.render(question, generation_prompt=True)

    @cached_property
    def _before_a_question(self) -> str | None:
        """What stands between an answer and the question that follows it."""
        message = self._probes.message
        text = self._probes.render(message("user", "zqvquestion"), message("assistant"), message("user", "zqvnext"))
        after = (text or "").partition(PROBE)[2]
        return after.partition("zqvnext")[0] if "zqvnext" in after else None

    @cached_property
    def asks_for_reasoning(self) -> bool:
        """Whether what the model writes begins within its reasoning, which is then taken from the message itself."""
        prompt = self._probes.render(self._probes.message("user", "zqvquestion"), generation_prompt=True)
        return not self.template.has_generation_blocks and bool(OPEN_REASONING.search(prompt or ""))

    @cached_property
    def by_next_header(self) -> bool:
        """Whether a turn has no token of its own to end it, and the header of the next message does."""
        return not self.ending().text and not self.plain_end.strip() and bool(self.stop("user"))

    @cached_property
    def known(self) -> bool:
        """Whether a control token ends a turn, its own or the next header's."""
        return bool(self.ending().text) or self.by_next_header

    @cached_property
    def plain_end(self) -> str:
        """What follows the content of a last answer, whatever it is."""
        text = self._probes.last("assistant", self._probes.message("assistant")["content"]) or ""
        return text.rpartition(PROBE)[2]

    def stop(self, role: str) -> str:
        """The token that begins a message of this role right after an answer, with whitespace before it, or nothing.

        An answer before a tool's message holds calls.
        """
        if role not in self._stops:
            answer = self._probes.message("assistant") | ({"tool_calls": [PROBE_CALL]} if role == "tool" else {})
            messages = (self._probes.message("user", "zqvquestion"), answer)
            before = self._probes.render(*messages) or ""
            text = self._probes.render(*messages, self._probes.message(role, "zqvnext")) or ""
            self._stops[role] = self.control_at(text, len(before)) if before and text.startswith(before) else ""
        return self._stops[role]

    @cached_property
    def _header_tokens(self) -> frozenset[str]:
        """The control tokens of the headers of a question and an answer."""
        text = self._probes.last("assistant", self._probes.message("assistant")["content"]) or ""
        before = text[: max(0, text.rfind(PROBE))]
        return frozenset(self.template.control.findall(before)) - {self.ending("user").text.strip()}

    def before_answer(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        """What stands before an answer to these messages, where the template renders one."""
        try:
            text = self.template.render([*messages, self._probes.message("assistant")], tools)
        except RenderError:
            return None
        before, found, _ = text.partition(PROBE)
        return before.removesuffix(self._before_content) if found else None

    @cached_property
    def _before_content(self) -> str:
        """What the model itself writes before the content of an answer, such as the name of a channel."""
        question = self._probes.message("user", "zqvquestion")
        prompt = self._probes.render(question, generation_prompt=True)
        before = (self._probes.render(question, self._probes.message("assistant")) or "").partition(PROBE)[0]
        return before.removeprefix(prompt) if prompt and before.startswith(prompt) else ""

    def ask_alike(self, header: str, prompt: str) -> bool:
        """Whether two texts end alike, down to a control token at least."""
        shared = common_prefix(header[::-1], prompt[::-1])
        return bool(self._first_control(header[len(header) - shared :]))

    def end_of_turn(self, text: str, start: int) -> int:
        """Where the turn ends that begins at ``start`` and with which the text ends: after the token that ends it."""
        tail = self.ending().tail
        end = len(text) - len(tail) if tail and text.endswith(tail) else len(text)
        end = max(start, end)
        stripped = text[start:end].rstrip()
        return start + len(stripped) if stripped.endswith(self.template.controls) else end

    def end_of_block(self, text: str, span: Span) -> int:
        """Where the turn ends of which this is the last generation block, in a text that ends with the turn."""
        return min(span[1], self.end_of_turn(text, span[0])) if self.ending().tail.strip() else span[1]

    def closed(self, text: str, span: Span) -> Span:
        """A generation block with the token that ends its turn, where the block leaves that to what follows it."""
        start, end = span
        token = self.ending().text.strip()
        if not token or text[start:end].rstrip().endswith(token):
            return span
        if text.startswith(self.ending().text, end):
            return start, end + len(self.ending().text)
        # a turn of another kind, such as one with calls, may end by another token, which no header holds
        after = self.template.control.match(text, end)
        if after is None or (after.group() in self._header_tokens and after.group() != self.template.eos):
            return span
        return start, after.end()

    def control_at(self, text: str, position: int) -> str:
        """The control token that a text has at a position, with the whitespace before it, or nothing."""
        begin = len(text) - len(text[position:].lstrip())
        match = self.template.control.match(text, begin)
        return text[position : match.end()] if match else ""

    def token_start(self, text: str, position: int) -> int:
        """The position, or where the control token begins that it lies within."""
        longest = max(map(len, self.template.controls), default=0)
        tokens = self.template.control.finditer(text, max(0, position - longest), position + longest)
        return next((token.start() for token in tokens if token.start() < position < token.end()), position)
