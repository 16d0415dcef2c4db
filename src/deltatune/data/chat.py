"""Rows to samples: the chat template, and which of its tokens train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltatune.data.formats import Layout, Row, check_row
from deltatune.data.messages import Conversation, read_conversation, read_text
from deltatune.data.notes import Notes
from deltatune.data.tokens import read_tokens
from deltatune.errors import DataError, one_line
from deltatune.packing.sample import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "Sample", "TrainOn"]

TrainOn = Literal["assistant", "last", "all"]
Span = tuple[int, int]
Indices = NDArray[np.int64]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Renderer:
    """Renders rows with a tokenizer and marks the tokens that train.

    Chat. Assistant turns train, up to and including the token that ends the turn. Where they are is known exactly, in
    one of two ways: a template with ``{% generation %}`` blocks says it; for any other template the conversation is
    rendered up to each turn, once ending in the generation prompt and once with the turn, and the turn is what the
    second has beyond the first. A template may render an earlier turn differently once more messages follow
    (reasoning removed from the history): such a turn trains in a sample of its own that ends with it, which is what
    the model sees when it writes that turn. So a row gives one sample, or several, and each turn trains once.

    Prompt and completion. The prompt's tokens are those of the prompt alone, as at inference; the completion and the
    end-of-sequence token train. Lists of messages are rendered as chat, and only the completion's turns train.

    Text. Everything trains, the end-of-sequence token after it too.

    Tokens. Rows that are tokenised already say themselves what trains.
    """

    tokenizer: PreTrainedTokenizerBase  # a fast one: trained characters are mapped to tokens by its offsets
    train_on: TrainOn = "assistant"  # every assistant turn, the "last" one, or "all" tokens, prompts included
    chat_template: str | None = None  # in place of the tokenizer's own
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the template: {"enable_thinking": False}

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{type(self.tokenizer).__name__} has no character offsets, which tell the trained tokens; "
                "use a fast tokenizer (one saved with a tokenizer.json)"
            )

    def render(self, row: Row, layout: Layout, where: str, notes: Notes | None = None) -> list[Sample]:
        """The samples of a row; ``where`` names the row in errors, and ``notes`` takes what is no error.

        Raises:
            DataError: a row that does not hold what ``layout`` says, that the template cannot render, or that would
                train nothing.
        """
        check_row(row, layout, where)
        pair = [row.get(layout.column(role)) for role in ("prompt", "completion")]
        if layout.format == "tokens":
            samples = [read_tokens(row, layout, len(self.tokenizer), where)]
        elif layout.format == "text":
            ids = self._with_eos(self._ids(read_text(row, layout.column("text"), where), special=True))
            samples = [Sample(ids, ids)]
        elif layout.format == "prompt_completion" and not any(isinstance(value, list) for value in pair):
            if notes is not None and any(row.get(layout.column(role)) for role in ("tools", "functions")):
                notes.add("tools are left out: a prompt and a completion of plain text have no place for them", where)
            samples = [self._completion(row, layout, where)]
        else:
            samples = self._chat(read_conversation(row, layout, where, notes), where)
        if not samples or not all(sample.num_trained for sample in samples):
            raise DataError(f"{where} trains nothing: none of its tokens is a target; remove the row")
        return samples

    def _completion(self, row: Row, layout: Layout, where: str) -> Sample:
        prompt = read_text(row, layout.column("prompt"), where, allow_empty=True)
        completion = read_text(row, layout.column("completion"), where)
        head = self._ids(prompt, special=True)
        if head.size > self._ids(prompt, special=False).size and head[-1] == self.tokenizer.eos_token_id:
            head = head[:-1]
        ids = self._ids(prompt + completion, special=True)
        if not np.array_equal(ids[: head.size], head):
            # a token across the seam is one the model could never write after this prompt
            ids = np.concatenate([head, self._ids(completion, special=False)])
        ids = self._with_eos(ids)
        trained = np.arange(ids.size) >= (0 if self.train_on == "all" else head.size)
        return _labelled(ids, trained)

    def _ids(self, text: str, *, special: bool) -> Indices:
        encoded = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def _with_eos(self, ids: Indices) -> Indices:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no eos_token, so a text would have no end; set one and save it again")
        return ids if ids.size and ids[-1] == eos else np.append(ids, eos)

    def _chat(self, conversation: Conversation, where: str) -> list[Sample]:
        template = _Template(self, conversation, where)
        messages = conversation.messages
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in turns if i >= conversation.num_prompt]
        if not wanted and self.train_on != "all":
            place = "completion" if conversation.num_prompt else "conversation"
            raise DataError(f"{where} has no assistant turn in its {place}, so nothing would train; remove the row")
        if self.train_on == "all":
            text = template.text(len(messages))
            return [self._encode(text, [(0, len(text))])]
        if self.train_on == "last":
            wanted = wanted[-1:]
        if template.has_generation_blocks:
            text, spans = template.render(len(messages))
            return [self._encode(text, _of_turns(spans, turns, wanted, where), extend_to_eos=True)]
        return [self._encode(text, spans, trim=True) for text, spans in template.turns(wanted)]

    def _encode(self, text: str, spans: list[Span], *, extend_to_eos: bool = False, trim: bool = False) -> Sample:
        """Tokens of a rendered conversation; those that lie inside a span train.

        ``trim`` leaves out whitespace that a template writes between the end-of-turn token and the next header, which
        no model is asked for; ``extend_to_eos`` adds an end-of-sequence token that directly follows a span.
        """
        ids, starts, ends = self._tokens(text)
        # an offset may leave out the space that its token begins with, so a token reaches back to the one before it
        reaches = np.concatenate([[0], ends])[: ends.size]
        across = sorted({start for start, _ in spans if ((reaches < start) & (start < ends)).any()})
        if across:
            # a token across the seam is one the model could never write after this prompt
            pieces = [(at, self._tokens(text[at:to])) for at, to in pairwise([0, *across, len(text)])]
            ids = np.concatenate([piece[0] for _, piece in pieces])
            starts, ends = (np.concatenate([at + piece[side] for at, piece in pieces]) for side in (1, 2))
        trained = np.zeros(ids.size, dtype=bool)
        for start, end in spans:
            inside = np.flatnonzero((starts >= start) & (ends <= end))
            if trim:
                last = next((i for i in inside[::-1] if not text[starts[i] : ends[i]].isspace()), None)
                if last is not None and int(ids[last]) in self._control_tokens:
                    inside = inside[inside <= last]
            trained[inside] = True
            after = int(np.searchsorted(starts, end))
            if extend_to_eos and after < ids.size and starts[after] == end:
                trained[after] |= ids[after] == self.tokenizer.eos_token_id
        return _labelled(ids, trained)

    def _tokens(self, text: str) -> tuple[Indices, Indices, Indices]:
        """Ids of a text, and the characters where each token begins and ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        # a tokenizer that trims offsets gives whitespace tokens none: they begin where the token before ended
        starts = np.where(starts < ends, starts, np.concatenate([[0], ends])[: ends.size])
        return np.asarray(encoded["input_ids"], dtype=np.int64), starts, ends

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)


class _Template:
    """A conversation under a chat template, rendered up to any message."""

    def __init__(self, renderer: Renderer, conversation: Conversation, where: str) -> None:
        self._conversation = conversation
        self._where = where
        tokenizer = renderer.tokenizer
        try:
            self._source = tokenizer.get_chat_template(renderer.chat_template, conversation.tools)
        except ValueError as error:
            raise DataError(
                f"{where} is a conversation, but the tokenizer has no chat template; set model.chat_template, or use "
                f"an instruction-tuned checkpoint's tokenizer ({one_line(error)})"
            ) from error
        self._variables = {**tokenizer.special_tokens_map, **renderer.template_kwargs}
        self._texts: dict[tuple[int, bool], str] = {}
        self.has_generation_blocks = bool(_GENERATION_BLOCK.search(self._source))

    def text(self, num_messages: int, *, generation_prompt: bool = False) -> str:
        """The first messages as text, perhaps with the header that asks the model for the next one."""
        key = (num_messages, generation_prompt)
        if key not in self._texts:
            self._texts[key] = self.render(*key)[0]
        return self._texts[key]

    def turns(self, wanted: list[int]) -> list[tuple[str, list[Span]]]:
        """Texts and the turns that train in each: the fewest texts in which each turn stands as it was asked for.

        The whole conversation comes first. A turn that it shows otherwise than the conversation up to that turn does
        is left to a shorter text, which ends with the latest turn still missing.
        """
        texts = []
        end = len(self._conversation.messages)
        while wanted:
            text = self.text(end)
            held = [turn for turn in wanted if text.startswith(self.text(turn + 1))]
            if held:
                texts.append((text, [self._span(turn) for turn in held]))
            wanted = [turn for turn in wanted if turn not in held]
            end = wanted[-1] + 1 if wanted else 0
        return texts[::-1]

    def _span(self, turn: int) -> Span:
        prompt, text = self.text(turn, generation_prompt=True), self.text(turn + 1)
        if not text.startswith(prompt):
            common = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
            near = slice(max(0, common - 20), common + 20)
            raise DataError(
                f"{self._where}: the template asks for message {turn} with {prompt[near]!r} but renders it as "
                f"{text[near]!r}, so its trained tokens cannot be told; set "
                "chat_template_kwargs that make the two agree (enable_thinking: true or false), or use a template "
                "with {% generation %} blocks"
            )
        return len(prompt), len(text)

    def render(self, num_messages: int, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The first messages as text, and where generation blocks lie in it."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[self._conversation.messages[:num_messages]],
                tools=self._conversation.tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self.has_generation_blocks,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            total = len(self._conversation.messages)
            part = f"its first {num_messages} of {total} messages" if num_messages < total else "it"
            raise DataError(
                f"{self._where}: the chat template cannot render {part}: {one_line(error)}; mend the row, or use "
                "train_on: last where only a part fails"
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def _of_turns(spans: list[Span], turns: list[int], wanted: list[int], where: str) -> list[Span]:
    """The generation blocks of the wanted turns."""
    if wanted == turns:
        return spans
    if len(spans) != len(turns):
        raise DataError(
            f"{where}: the template marks {len(spans)} generation blocks for {len(turns)} assistant turns, so the "
            "turns cannot be told apart; train_on: assistant, or use a template with one block per turn"
        )
    return [spans[turns.index(turn)] for turn in wanted]


def _labelled(ids: Indices, trained: NDArray[np.bool_]) -> Sample:
    return Sample(ids, np.where(trained, ids, IGNORE_INDEX))
