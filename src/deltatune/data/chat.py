"""Rows to samples: the chat template, and which of its tokens train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltatune.data.contents import Completion, TrainOn, plain_targets, read_row, wanted_turns
from deltatune.data.conversation import RenderedConversation
from deltatune.data.formats import Layout, Row, check_row
from deltatune.data.message_forms import MessageForms
from deltatune.data.messages import Conversation
from deltatune.data.notes import EMPTY_TARGET, Notes
from deltatune.data.pairs import TextPair
from deltatune.data.probes import Probes
from deltatune.data.template import ChatTemplate, Span, check_variables
from deltatune.data.tokens import read_tokens
from deltatune.data.turn_ends import TurnEnds
from deltatune.data.unrendered import UnreadKeys
from deltatune.errors import DataError, one_line
from deltatune.packing.sample import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "Sample", "TrainOn"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Renderer:
    """Renders rows with a tokenizer and marks the tokens that train.

    Chat. Assistant turns train, up to and including the token that ends the turn. Where they are is known exactly, in
    one of two ways: a template with ``{% generation %}`` blocks says it; for any other template the conversation is
    rendered up to each turn, once ending in the generation prompt and once with the turn, and the turn is what the
    second has beyond the first. A template may render an earlier turn differently once more messages follow
    (reasoning removed from the history): such a turn trains in a sample of its own that ends with it, which is what
    the model sees when it writes that turn. So a row gives one sample, or several, and each turn trains once. A row
    may say of each message whether it trains (``Conversation.trains``), whatever ``train_on`` says.

    Prompt and completion. The prompt's tokens are those of the prompt alone, as at inference; the completion and the
    end-of-sequence token train. Lists of messages are rendered as chat, and only the completion's turns train.

    Text. Everything trains, the end-of-sequence token after it too.

    Preference. A pair is two samples, the preferred answer's first, each with the prompt before it; what trains, and so
    counts in a loss, is the answer, as in a completion.

    Tokens. Rows that are tokenised already say themselves what trains.
    """

    tokenizer: PreTrainedTokenizerBase  # a fast one: trained characters are mapped to tokens by its offsets
    train_on: TrainOn = "assistant"  # or the "last" assistant turn, "all" tokens, prompts included, or a list of roles
    chat_template: str | None = None  # in place of the tokenizer's own
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the template: {"enable_thinking": False}

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{type(self.tokenizer).__name__} has no character offsets, which tell the trained tokens; "
                "use a fast tokenizer (one saved with a tokenizer.json)"
            )
        if self.template_kwargs and (self.chat_template or self.tokenizer.chat_template):
            templates = self.chat_template or self.tokenizer.chat_template
            check_variables([*templates.values()] if isinstance(templates, dict) else [templates], self.template_kwargs)

    def render(self, row: Row, layout: Layout, where: str, notes: Notes | None = None) -> list[Sample]:
        """The samples of a row; ``where`` names the row in errors, and ``notes`` takes what is no error.

        Raises:
            DataError: a row that does not hold what ``layout`` says, that the template cannot render, or that would
                train nothing.
        """
        if layout.format == "tokens":
            check_row(row, layout, where)
            (sample,) = _checked([read_tokens(row, layout, len(self.tokenizer), where)], where)
            targets = sample.labels[sample.labels != IGNORE_INDEX]
            if notes is not None and all(map(self._is_blank, targets)):
                notes.add(EMPTY_TARGET, where)
            return [sample]
        content = read_row(row, layout, where, notes)
        if notes is not None and any(text.isspace() for text in plain_targets(content)):
            notes.add(EMPTY_TARGET, where)
        if isinstance(content, str):
            ids = self._with_eos(self._ids(content, special=True))
            return _checked([Sample(ids, ids)], where)
        if isinstance(content, Completion):
            return _checked([self._completion(content.prompt, content.completion)], where)
        if isinstance(content, Conversation):
            return self.render_conversation(content, where, notes)
        return self._pair(content, where, notes)

    def render_conversation(self, conversation: Conversation, where: str, notes: Notes | None = None) -> list[Sample]:
        """The samples of a conversation; otherwise as ``render``."""
        template = self._template(conversation, where)
        messages, tools = template.forms.convert(conversation.messages), conversation.tools
        notes = Notes() if notes is None else notes
        template.unread.note(messages, tools, where, notes)
        if not template.ends.known:
            written = f"{template.ends.plain_end!r} alone" if template.ends.plain_end else "nothing"
            notes.add(
                "no control token ends an assistant turn in the chat template, which writes "
                f"{written}: no single token tells the model to stop",
                where,
            )
        rendered = RenderedConversation(template.ends, messages, tools, where, notes)
        if self.train_on == "all":
            unmarked = [i for i, trains in enumerate(conversation.trains) if trains is False]
            texts = [rendered.whole(unmarked)]
        else:
            texts = rendered.trained(wanted_turns(conversation, self.train_on, where))
        return _checked([self._encode(text.text, text.all_spans) for text in texts], where)

    def _pair(
        self, pair: TextPair | tuple[Conversation, Conversation], where: str, notes: Notes | None
    ) -> list[Sample]:
        if isinstance(pair, TextPair):
            return [self._completion(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        samples = []
        for role, conversation in zip(("chosen", "rejected"), pair, strict=True):
            parts = self.render_conversation(conversation, f"{where}: {role}", notes)
            if len(parts) > 1:
                raise DataError(
                    f"{where}: {role} has {len(parts)} assistant turns that the chat template shows otherwise once "
                    "others follow, and an answer is one document; set data.train_on: last, or shorten it"
                )
            samples += parts
        return samples

    def _completion(self, prompt: str, completion: str) -> Sample:
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

    def _template(self, conversation: Conversation, where: str) -> _Template:
        try:
            source = self.tokenizer.get_chat_template(self.chat_template, conversation.tools)
        except ValueError as error:
            raise DataError(
                f"{where} is a conversation, but the tokenizer has no chat template; set model.chat_template, or use "
                f"an instruction-tuned checkpoint's tokenizer ({one_line(error)})"
            ) from error
        if source not in self._templates:
            self._templates[source] = _Template(ChatTemplate(source, self.tokenizer, self.template_kwargs))
        return self._templates[source]

    @cached_property
    def _templates(self) -> dict[str, _Template]:
        """What was found out about each template; a tokenizer may have one for conversations with tools."""
        return {}

    def _encode(self, text: str, spans: list[Span]) -> Sample:
        """Tokens of a rendered conversation; those that lie inside a span train."""
        ids, starts, ends = self._tokens(text)
        # an offset may leave out the space that its token begins with, so a token reaches back to the one before it
        reaches = _shifted(ends)
        # the token that holds the first character of each span
        holding = {start: int(np.argmax(ends > start)) for start, _ in spans} if ids.size else {}
        across = sorted(start for start, token in holding.items() if reaches[token] < start < ends[token])
        if across:
            # a token across the seam is one the model could never write after this prompt
            pieces = [(at, self._tokens(text[at:to])) for at, to in pairwise([0, *across, len(text)])]
            ids = np.concatenate([piece[0] for _, piece in pieces])
            starts, ends = (np.concatenate([at + piece[side] for at, piece in pieces]) for side in (1, 2))
        trained = np.zeros(ids.size, dtype=bool)
        for start, end in spans:
            inside = (starts >= start) & (ends <= end)
            # an end-of-turn token may take the whitespace after it along
            last = int(np.searchsorted(starts, end)) - 1
            if last >= 0 and starts[last] >= start and int(ids[last]) in self._control_tokens:
                inside[last] = True
            trained |= inside
        return _labelled(ids, trained)

    def _tokens(self, text: str) -> tuple[Indices, Indices, Indices]:
        """Ids of a text, and the characters where each token begins and ends."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoded.offsets), dtype=np.int64)
        starts, ends = offsets[::2], offsets[1::2]
        # a tokenizer that trims offsets gives whitespace tokens none: they begin where the token before ended
        starts = np.where(starts < ends, starts, _shifted(ends))
        return np.asarray(encoded.ids, dtype=np.int64), starts, ends

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer itself, without what a call of it builds around ids and offsets, for rows by the million."""
        self.tokenizer("", verbose=False)  # leaves it as calls do: no truncation, no padding
        return self.tokenizer.backend_tokenizer

    def _is_blank(self, token: np.int64) -> bool:
        """Whether a token is whitespace or a control token."""
        return int(token) in self._control_tokens or self.tokenizer.decode([int(token)]).isspace()

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, token in added if str(token).strip())


class _Template:
    """What is found out about a chat template, once for all rows."""

    def __init__(self, template: ChatTemplate) -> None:
        probes = Probes(template)
        self.forms = MessageForms(probes)
        self.ends = TurnEnds(probes)
        self.unread = UnreadKeys(template, reasoning_is_read=self.ends.asks_for_reasoning)


def _checked(samples: list[Sample], where: str) -> list[Sample]:
    if not samples or not all(sample.num_trained for sample in samples):
        raise DataError(f"{where} trains nothing: none of its tokens is a target; remove the row")
    return samples


def _shifted(ends: Indices) -> Indices:
    """Where the token before each one ends."""
    before = np.zeros_like(ends)
    before[1:] = ends[:-1]
    return before


def _labelled(ids: Indices, trained: NDArray[np.bool_]) -> Sample:
    return Sample(ids, np.where(trained, ids, IGNORE_INDEX))
