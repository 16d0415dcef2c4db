"""One conversation under a chat template: the texts in which its turns train, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.notes import EMPTY_TARGET, Notes
from deltatune.data.prefix import common_prefix
from deltatune.data.probes import PROBE, as_parts
from deltatune.data.template import RenderError, Span
from deltatune.data.turn_ends import OPEN_REASONING, TurnEnds
from deltatune.data.turns import REASONING_KEYS, is_empty
from deltatune.data.unrendered import check_calls, drops_answer, drops_reasoning
from deltatune.errors import DataError

__all__ = ["RenderedConversation", "TrainedText"]


@dataclass
class TrainedText:
    """A rendered conversation, and the stretches of it that train."""

    text: str
    spans: dict[int, list[Span]]  # by the number of the message

    @property
    def all_spans(self) -> list[Span]:
        """The stretches of all messages."""
        return [span for spans in self.spans.values() for span in spans]


class RenderedConversation:
    """Messages under a template, rendered up to any of them."""

    def __init__(
        self, ends: TurnEnds, messages: Sequence[Message], tools: list[Any] | None, where: str, notes: Notes
    ) -> None:
        self._ends = ends
        self._template = ends.template
        self._messages = messages
        self._tools = tools
        self._where = where
        self._notes = notes
        self._without_reasoning = False  # whether that was noted of this row
        self._texts: dict[tuple[int, bool], str] = {}
        self._blocks: dict[int, list[Span]] = {}

    def text(self, num_messages: int, *, generation_prompt: bool = False) -> str:
        """The first messages as text, perhaps with the header that asks the model for the next one."""
        key = (num_messages, generation_prompt)
        if key not in self._texts:
            try:
                self._texts[key] = self._template.render(
                    self._messages[:num_messages], self._tools, generation_prompt=generation_prompt
                )
            except RenderError as error:
                raise self._failed(num_messages, error) from error
        return self._texts[key]

    def blocks(self, num_messages: int) -> list[Span]:
        """Where generation blocks lie in ``text(num_messages)``."""
        if not num_messages:
            return []
        if num_messages not in self._blocks:
            try:
                text, spans = self._template.render_blocks(self._messages[:num_messages], self._tools)
            except RenderError as error:
                raise self._failed(num_messages, error) from error
            self._texts[num_messages, False] = text
            self._blocks[num_messages] = spans
        return self._blocks[num_messages]

    def _failed(self, num_messages: int, error: RenderError) -> DataError:
        total = len(self._messages)
        part = f"its first {num_messages} of {total} messages" if num_messages < total else "it"
        return DataError(
            f"{self._where}: the chat template cannot render {part}: {error}; mend the row, or use "
            "train_on: last where only a part fails"
        )

    def trained(self, turns: Sequence[int]) -> list[TrainedText]:
        """The fewest texts in which each of these messages trains once, as the model sees it when it writes it.

        The whole conversation comes first. An assistant turn that it shows otherwise than the conversation up to that
        turn does is left to a shorter text, which ends with the latest turn still missing. Messages of other roles
        train in the whole conversation.
        """
        self._note_empty(turns)
        answers = [turn for turn in turns if self._messages[turn]["role"] == "assistant"]
        texts = self._answers_as_asked(answers)
        full = self.text(len(self._messages))
        others = {turn: [self._content(turn)] for turn in turns if turn not in answers}
        if others and texts and texts[-1].text.startswith(full):
            texts[-1].spans |= others
        elif others:
            texts.append(TrainedText(full, others))
        without_reasoning = without_answer = False
        for text in texts:
            for turn, spans in text.spans.items():
                written = "".join(text.text[start:end] for start, end in spans)
                self._check_calls(turn, written)
                message = self._messages[turn]
                without_reasoning |= drops_reasoning(message.get("content"), written)
                # text beside calls is noted as a key that is not read
                without_answer |= not message.get("tool_calls") and drops_answer(message.get("content"), written)
        if without_reasoning:
            self._notes.add("the chat template drops the reasoning in the content of answers that train", self._where)
        if without_answer:
            self._notes.add(
                "text of answers is changed by the chat template, or not all of it is among what trains", self._where
            )
        return texts

    def _answers_as_asked(self, turns: Sequence[int]) -> list[TrainedText]:
        if not turns:
            return []
        if self._template.has_generation_blocks and self._blocks_stay(turns):
            total = len(self._messages)
            spans = dict(zip(self._answers(total), self.blocks(total), strict=True))
            return [self._closed(self.text(total), {turn: [spans[turn]] for turn in turns})]
        return self._each_as_asked(turns)

    def whole(self, untrained: Sequence[int]) -> TrainedText:
        """The whole conversation, of which all trains but these messages."""
        text = self.text(len(self._messages))
        answers = self._answers(len(self._messages))
        self._note_empty([turn for turn in answers if turn not in untrained])
        for turn in answers:
            self._check_calls(turn, text)
        spans, start = [], 0
        for first, last in sorted(self._held_or_content(turn) for turn in untrained):
            spans.append((start, first))
            start = last
        spans = [span for span in (*spans, (start, len(text))) if span[0] < span[1]]
        return TrainedText(text, {0: spans})

    def _note_empty(self, turns: Sequence[int]) -> None:
        if any(is_empty(self._messages[turn]) for turn in turns):
            self._notes.add(EMPTY_TARGET, self._where)

    def _check_calls(self, turn: int, text: str) -> None:
        if calls := self._messages[turn].get("tool_calls"):
            check_calls(calls, text, f"{self._where}: message {turn}")

    def _held_or_content(self, turn: int) -> Span:
        text = self.text(len(self._messages))
        if self._messages[turn]["role"] == "assistant":
            for trained in self._each_as_asked([turn]):
                if trained.text.startswith(text):
                    return trained.spans[turn][0][0], trained.spans[turn][-1][1]
        return self._content(turn)

    def _answers(self, num_messages: int) -> list[int]:
        return [i for i, message in enumerate(self._messages[:num_messages]) if message["role"] == "assistant"]

    def _blocks_stay(self, turns: Sequence[int]) -> bool:
        """Whether the blocks of the whole conversation are these turns as they were asked for, one each.

        That depends on the shape of a conversation and not on its words, so it is found once for each shape.
        """
        total = len(self._messages)
        answers = self._answers(total)
        if len(self.blocks(total)) != len(answers):
            return False
        if all(turn == total - 1 for turn in turns):
            return True
        shape = tuple(_shape(message) for message in self._messages)
        if shape not in self._template.stable_shapes:
            own = {turn: self._block_turn(turn) for turn in answers[:-1]}
            self._template.stable_shapes[shape] = all(
                spans and self.text(total).startswith(text[: spans[-1][1]]) for text, spans in own.values()
            )
        return self._template.stable_shapes[shape]

    def _each_as_asked(self, turns: Sequence[int]) -> list[TrainedText]:
        find = self._block_turn if self._template.has_generation_blocks else self._prompted_turn
        own = {turn: find(turn) for turn in turns}
        missing = [turn for turn in turns if own[turn][1]]
        texts = []
        text = self.text(len(self._messages))
        while missing:
            held = {turn: own[turn][1] for turn in missing if text.startswith(own[turn][0][: own[turn][1][-1][1]])}
            if held:
                texts.append(self._closed(text, held))
            missing = [turn for turn in missing if turn not in held]
            text = own[missing[-1]][0] if missing else ""
        return texts[::-1]

    def _block_turn(self, turn: int) -> tuple[str, list[Span]]:
        """The conversation up to a turn, and the turn's generation blocks."""
        spans = self.blocks(turn + 1)[len(self.blocks(turn)) :]
        text = self.text(turn + 1)
        return text, [*spans[:-1], *((start, self._ends.end_of_block(text, (start, end))) for start, end in spans[-1:])]

    def _prompted_turn(self, turn: int) -> tuple[str, list[Span]]:
        """The conversation up to a turn, and what it has beyond the prompt that asks for the turn."""
        prompt, text = self.text(turn, generation_prompt=True), self.text(turn + 1)
        if text.startswith(prompt):
            return text, [(len(prompt), self._ends.end_of_turn(text, len(prompt)))]
        common = common_prefix(prompt, text)
        start = min(self._ends.token_start(side, common) for side in (text, prompt))
        if prompt == self.text(turn) and text.endswith(prompt[start:]):
            # no prompt asks for the turn, and what closes a conversation stands after its last message
            closing = prompt[start:]
            if self._ends.ending().text and closing.startswith(self._ends.ending().text):
                # the turn goes on where the message before it was closed, and ends as that did
                return text, [(start, len(text) - len(closing) + len(self._ends.ending().text))]
            return text, [(start, self._ends.end_of_turn(text[: len(text) - len(closing)], start))]
        opened = OPEN_REASONING.search(prompt)
        if opened and text.startswith(prompt[: opened.start()]):
            written = self._written_reasoning(turn, opened, text[opened.start() :])
            end = self._ends.end_of_turn(text, opened.start()) - len(text)
            text = prompt + written
            return text, [(len(prompt), len(text) + end)]
        header = self._ends.before_answer(self._messages[:turn], self._tools)
        if header is not None and text.startswith(header) and self._ends.ask_alike(header, prompt):
            # what stands before the turn changes once it is there: a system message that only a last question holds
            end = self._ends.end_of_turn(text, len(header)) - len(text)
            text = prompt + text[len(header) :]
            return text, [(len(prompt), len(text) + end)]
        near = slice(max(0, common - 20), common + 20)
        raise DataError(
            f"{self._where}: the template asks for message {turn} with {prompt[near]!r} but renders it as "
            f"{text[near]!r}, so its trained tokens cannot be told; set "
            "chat_template_kwargs that make the two agree (enable_thinking: true or false), or use a template "
            "with {% generation %} blocks"
        )

    def _written_reasoning(self, turn: int, opened: re.Match[str], rendered: str) -> str:
        """What the model writes after a prompt that opens its reasoning, where the template shows the answer alone."""
        message = self._messages[turn]
        content = message.get("content")
        opening, closing = f"<{opened[1]}>", f"</{opened[1]}>"
        given = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        in_content = isinstance(content, str) and closing in content
        if not given and not in_content and not self._without_reasoning:
            self._without_reasoning = True
            self._notes.add(
                f"the chat template's generation prompt opens reasoning with {opening}; answers without any train "
                f"with an empty one, {closing} first",
                self._where,
            )
        if rendered.startswith(opening):
            return rendered.removeprefix(opening).removeprefix(opened[2])
        if rendered.startswith(closing):
            if not given and not in_content:
                return rendered
            rendered = rendered.removeprefix(closing)
        if in_content:
            reasoning, _, answer = str(content).rpartition(closing)
            reasoning = reasoning.lstrip().removeprefix(opening) if opening in reasoning else opened[2] + reasoning
            gap = answer[: len(answer) - len(answer.lstrip())]
        else:
            reasoning, gap = f"\n{given.strip()}\n", "\n\n"
        return reasoning.removeprefix(opened[2]) + closing + (rendered if rendered[:1].isspace() else gap + rendered)

    def _content(self, turn: int) -> Span:
        """Where the content of a message lies in the whole conversation, with the token that ends its turn."""
        message = self._messages[turn]
        parts = isinstance(message["content"], list)
        replaced = {**message, "content": as_parts(PROBE) if parts else PROBE}
        messages = [*self._messages[:turn], replaced, *self._messages[turn + 1 :]]
        full = self.text(len(messages))
        try:
            before, found, after = self._template.render(messages, self._tools).partition(PROBE)
        except RenderError as error:
            raise self._failed(len(messages), error) from error
        if not found or PROBE in after or not (full.startswith(before) and full.endswith(after)):
            raise DataError(
                f"{self._where}: the content of message {turn} ({message['role']}) cannot be found in what the chat "
                "template renders, so it cannot train; take its mark or its role out of what trains"
            )
        end = len(full) - len(after)
        closing = self._ends.ending(message["role"]).text
        return len(before), end + len(closing) if full.startswith(closing, end) else end

    def _closed(self, text: str, spans: dict[int, list[Span]]) -> TrainedText:
        """Adds to each turn the token that tells the model to stop, where that is not within the turn."""
        closed = {}
        for turn, given in sorted(spans.items()):
            *blocks, (start, end) = given
            if self._ends.by_next_header:
                text, end = self._with_stop(text, end, turn)
            elif self._template.has_generation_blocks:
                start, end = self._ends.closed(text, (start, end))
            closed[turn] = [*blocks, (start, end)]
        return TrainedText(text, closed)

    def _with_stop(self, text: str, end: int, turn: int) -> tuple[str, int]:
        """The header that ends a turn, which stands behind it or, at the end of a text, is added as it would follow."""
        answers_tool = "tool" if self._messages[turn].get("tool_calls") else "user"
        follower = self._messages[turn + 1]["role"] if turn + 1 < len(self._messages) else answers_tool
        if follower == "assistant":
            return text, end
        if end == len(text):
            text += self._ends.stop(follower)
        return text, end + len(self._ends.control_at(text, end))


def _shape(message: Message) -> tuple[Any, ...]:
    """What of a message a template may decide by: its keys, the kinds of their values, and reasoning in the text."""
    content = message["content"]
    reasons = isinstance(content, str) and "</think>" in content
    if len(message) == 2:
        return message["role"], type(content), bool(content), reasons
    return message["role"], reasons, *((key, type(value), bool(value)) for key, value in message.items())
