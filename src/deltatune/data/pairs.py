"""Two answers to one prompt, the preferred one and the other, as two conversations or two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from deltatune.data.formats import Layout, Row, unused_columns
from deltatune.data.json_values import shown
from deltatune.data.messages import Conversation, Turns, read_asked, read_turns, with_system, without_filled_keys
from deltatune.data.notes import Notes
from deltatune.data.prefix import common_prefix
from deltatune.data.tools import read_tools
from deltatune.errors import DataError

__all__ = ["TextPair", "read_pair"]

_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class TextPair:
    """A prompt and two answers of plain text."""

    prompt: str
    chosen: str
    rejected: str


def read_pair(
    row: Row, layout: Layout, where: str, notes: Notes | None = None
) -> tuple[Conversation, Conversation] | TextPair:
    """The two conversations of a row of format preference, or its texts where it holds no messages.

    ``chosen`` and ``rejected`` are lists of messages, single messages, or strings; ``prompt`` is a list of messages or
    a string, or ``instruction``, ``input`` and ``history`` ask as in Alpaca. A string beside messages is a turn. A
    prompt may stand in both answers instead: it is what they begin with in common, of texts without a space at its end.
    ``notes`` takes what is no error.

    Raises:
        DataError: no prompt, no answer after it, answers that are equal, or what a conversation raises.
    """
    if layout.columnar:
        row = without_filled_keys(row, layout, where, notes)
    values = [_answer(row, layout, role, where) for role in _ANSWERS]
    prompt = row.get(layout.column("prompt"))
    asked = read_asked(row, layout, where)
    turns_of_text = asked is not None or row.get(layout.column("system"))
    if not turns_of_text and all(isinstance(value, str) for value in (*values, "" if prompt is None else prompt)):
        return _texts(row, layout, values, where)
    answers = [
        read_turns(value, layout.column(role), layout, where, "assistant")
        for role, value in zip(_ANSWERS, values, strict=True)
    ]
    if asked is None and prompt is not None:
        asked = read_turns(prompt, layout.column("prompt"), layout, where, "user")
    if asked is None or all(_holds_prompt(turns, asked, prompt) for turns in answers):
        asked, answers = _without_common_turns(answers, layout, where)
    _check_answers([turns.messages for turns in answers], where)
    tools = read_tools(row, layout, where)
    asked = with_system(asked, row, layout, where)
    first, second = (
        Conversation((asked + turns).messages, tools, len(asked.messages), (asked + turns).marks) for turns in answers
    )
    return first, second


def _answer(row: Row, layout: Layout, role: str, where: str) -> Any:
    column = layout.column(role)
    value = row.get(column)
    if value is None or value == "" or value == []:
        raise DataError(f"{where} has no {column}; a pair needs both answers, so remove the row")
    return [value] if isinstance(value, Mapping) else value


def _texts(row: Row, layout: Layout, answers: Sequence[str], where: str) -> TextPair:
    chosen, rejected = answers
    prompt = row.get(layout.column("prompt"))
    if prompt is None:
        others = [name for name in unused_columns(layout, row) if isinstance(row[name], str) and row[name]]
        if others and not layout.explicit:
            raise DataError(
                f"{where} has no {layout.column('prompt')}; name its column, as in columns: {{prompt: {others[0]}}}, "
                "or set format: preference where both answers begin with it"
            )
        prompt = chosen[: common_prefix(chosen, rejected)].removesuffix(" ")
        if not prompt:
            raise DataError(_no_prompt(where, layout))
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    _check_answers([chosen, rejected], where)
    return TextPair(prompt, chosen, rejected)


def _holds_prompt(answer: Turns, asked: Turns, prompt: Any) -> bool:
    """Whether an answer is the whole conversation, its prompt at the front."""
    whole = isinstance(prompt, str) and answer.messages[0]["role"] not in ("assistant", "tool")
    return whole or answer.messages[: len(asked.messages)] == asked.messages


def _without_common_turns(answers: Sequence[Turns], layout: Layout, where: str) -> tuple[Turns, list[Turns]]:
    sides = zip(*(turns.messages for turns in answers), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], sides))
    if not common:
        raise DataError(_no_prompt(where, layout))
    return answers[0][:common], [turns[common:] for turns in answers]


def _no_prompt(where: str, layout: Layout) -> str:
    return (
        f"{where} has no {layout.column('prompt')}, and its answers have no beginning in common; name the prompt's "
        "column, as in columns: {prompt: question}"
    )


def _check_answers(answers: Sequence[Any], where: str) -> None:
    if answers[0] == answers[1]:
        what = f"({shown(answers[0])}), so neither is preferred" if answers[0] else "and nothing but a prompt"
        raise DataError(f"{where}: chosen and rejected are equal {what}; remove the row")
    if not all(answers):
        raise DataError(f"{where}: one answer is the beginning of the other, so nothing of it is left; remove the row")
