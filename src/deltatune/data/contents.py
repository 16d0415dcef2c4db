"""What a row says, before any tokenizer: a text, a prompt and its completion, a conversation, or a pair of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from deltatune.data.formats import Layout, Row, check_row
from deltatune.data.messages import Conversation, read_conversation, read_text
from deltatune.data.notes import Notes
from deltatune.data.pairs import TextPair, read_pair
from deltatune.errors import DataError

__all__ = ["Completion", "Content", "TrainOn", "plain_targets", "read_row", "wanted_turns"]

# every assistant turn, the last one, all tokens, or every message of these roles
TrainOn = Literal["assistant", "last", "all"] | Sequence[str]


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, of plain text."""

    prompt: str
    completion: str


Content: TypeAlias = "str | Completion | Conversation | TextPair | tuple[Conversation, Conversation]"


def read_row(row: Row, layout: Layout, where: str, notes: Notes | None = None) -> Content:
    """The content of a row that is no row of tokens.

    A string is a text; a pair of conversations, or a ``TextPair``, two answers, the preferred one first. ``where``
    names the row in errors, and ``notes`` takes what is no error.

    Raises:
        DataError: a row that does not hold what ``layout`` says.
    """
    assert layout.format != "tokens"
    check_row(row, layout, where)
    if layout.format == "preference":
        pair = read_pair(row, layout, where, notes)
        if isinstance(pair, TextPair):
            _note_tools(row, layout, where, notes)
        return pair
    if layout.format == "text":
        return read_text(row, layout.column("text"), where)
    sides = [row.get(layout.column(role)) for role in ("prompt", "completion")]
    if layout.format == "prompt_completion" and not any(isinstance(value, list) for value in sides):
        _note_tools(row, layout, where, notes)
        prompt = read_text(row, layout.column("prompt"), where, allow_empty=True)
        return Completion(prompt, read_text(row, layout.column("completion"), where))
    return read_conversation(row, layout, where, notes)


def plain_targets(content: Content) -> tuple[str, ...]:
    """The plain texts that train, of which conversations have none."""
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Completion):
        return (content.completion,)
    return (content.chosen, content.rejected) if isinstance(content, TextPair) else ()


def wanted_turns(conversation: Conversation, train_on: TrainOn, where: str) -> list[int]:
    """The messages that train, by ``train_on`` (other than ``all``) and by what the row says of each.

    Raises:
        DataError: there is no message that could.
    """
    roles = ("assistant",) if isinstance(train_on, str) else train_on
    first, messages = conversation.num_prompt, conversation.messages
    wanted = [i for i in range(first, len(messages)) if messages[i]["role"] in roles]
    if train_on == "last":
        wanted = wanted[-1:]
    marks = {i: trains for i, trains in enumerate(conversation.trains) if i >= first and trains is not None}
    if not wanted and True not in marks.values():
        place = "completion" if first else "conversation"
        what = " or ".join(roles)
        raise DataError(f"{where} has no {what} turn in its {place}, so nothing would train; remove the row")
    return sorted({*wanted, *(i for i, trains in marks.items() if trains)} - {i for i in marks if not marks[i]})


def _note_tools(row: Row, layout: Layout, where: str, notes: Notes | None) -> None:
    if notes is not None and any(row.get(layout.column(role)) for role in ("tools", "functions")):
        notes.add("tools are left out: a prompt and a completion of plain text have no place for them", where)
