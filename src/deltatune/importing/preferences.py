"""Training on pairs of answers in other projects' words: which loss, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings
from deltatune.importing.values import is_off, number

__all__ = ["REFERENCE", "belongs_to", "loss_of", "only_with"]

REFERENCE = "the reference is the model without its adapter, or as it was at the start"
_NONE = "no preference training is asked for"


def loss_of(names: Mapping[str, str], others: str) -> Callable[[Any], Outcome]:
    """The loss by their name; ``others`` says why another cannot be had."""

    def read(value: Any) -> Outcome:
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if is_off(value):
            return Outcome("no effect here", why="off there too")
        if not isinstance(value, str) or value not in names:
            return Outcome("not supported", why=others)
        return Outcome("carried", {"preference.loss": names[value]})

    return read


def belongs_to(key: str, asked: Callable[[Settings], str | None], only: str | None = None) -> Rule:
    """A number that goes to ``preference.<key>`` where a loss is asked for, or this one."""

    def rule(value: Any, settings: Settings) -> Outcome:
        loss = asked(settings)
        if value is None or loss is None:
            return Outcome("no effect here", why="not set" if value is None else _NONE)
        if only not in (None, loss):
            return Outcome("no effect here", why=f"{only} alone reads it")
        return Outcome("carried", {f"preference.{key}": float(number(value))})

    return rule


def only_with(asked: Callable[[Settings], str | None], rule: Rule) -> Rule:
    """A rule of preference training, without which its key changes nothing."""

    def outer(value: Any, settings: Settings) -> Outcome:
        return Outcome("no effect here", why=_NONE) if asked(settings) is None else rule(value, settings)

    return outer
