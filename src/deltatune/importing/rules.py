"""What becomes of one key of another project's recipe: the rules that tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from deltatune.errors import UserError
from deltatune.importing.values import is_off

__all__ = [
    "Outcome",
    "Row",
    "Rule",
    "Settings",
    "Table",
    "Verdict",
    "alone",
    "carried",
    "changed",
    "idle",
    "other",
    "refused",
]

Verdict = Literal["carried", "changed", "not supported", "no effect here", "unknown"]
Settings: TypeAlias = Mapping[str, Any]
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Outcome:
    """What became of a key."""

    verdict: Verdict
    writes: Mapping[str, Any] = field(default_factory=dict)  # our dotted keys -> values
    why: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str  # theirs, dotted where it is inside another
    value: Any
    outcome: Outcome
    given: bool = True  # False: the file does not say it, and their default differs from ours


Rule: TypeAlias = Callable[[Any, Settings], Outcome]
"""The outcome of a value among all settings of its file; a UserError where the value is not of its kind."""


@dataclass(frozen=True)
class Table:
    """One project's format."""

    name: str
    rules: Mapping[str, Rule]
    # what the project takes where the file says nothing, where that is not what we take
    defaults: Callable[[Settings], Mapping[str, Any]]
    marks: frozenset[str] = frozenset()  # keys that no other format has
    patterns: Mapping[str, Rule] = field(default_factory=dict)  # regular expressions over whole keys -> rule
    # keys that hold several: to a row for each of them, with the path of the file
    sections: Mapping[str, Callable[[Any, Settings, Path], list[Row]]] = field(default_factory=dict)


def alone(read: Callable[[Any], Outcome]) -> Rule:
    """A rule of which the outcome hangs on the value alone."""

    def rule(value: Any, settings: Settings) -> Outcome:
        del settings
        return read(value)

    return rule


def carried(key: str, read: Callable[[Any], Any] = lambda value: value, why: str = "") -> Rule:
    """The value goes to one of our keys as it is."""

    @alone
    def rule(value: Any) -> Outcome:
        return _unset(value) or Outcome("carried", {key: read(value)}, why)

    return rule


def changed(key: str, read: Callable[[Any], Any], why: str) -> Rule:
    """What the value means goes to one of our keys, which says it otherwise."""

    @alone
    def rule(value: Any) -> Outcome:
        return _unset(value) or Outcome("changed", {key: read(value)}, why)

    return rule


def refused(why: str) -> Rule:
    """A setting that cannot be had here, unless it is off."""

    @alone
    def rule(value: Any) -> Outcome:
        off = _unset(value) or (Outcome("no effect here", why="off there too") if is_off(value) else None)
        return off or Outcome("not supported", why=why)

    return rule


def idle(why: str) -> Rule:
    """A setting that changes nothing here."""

    @alone
    def rule(value: Any) -> Outcome:
        return _unset(value) or Outcome("no effect here", why=why)

    return rule


def other(settings: Settings, key: str, read: Callable[[Any], _Read], default: Any = None) -> _Read:
    """What a rule reads of another key.

    Raises:
        UserError: a value that is not of that key's kind; it names the key.
    """
    given = settings.get(key)
    try:
        return read(default if given is None else given)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _unset(value: Any) -> Outcome | None:
    return Outcome("no effect here", why="not set") if value is None or value == "" else None
