"""Values as other projects write them: numbers as text, yes and no, lists as text with commas."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deltatune.config.explain import shown
from deltatune.errors import UserError

__all__ = ["NotLiteral", "count", "flag", "is_off", "mapping", "number", "steps", "text", "texts", "whole"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class NotLiteral:
    """What a script computes: it is never run, so its value is not known."""

    source: str

    def __str__(self) -> str:
        return self.source


def is_off(value: Any) -> bool:
    """Whether a value says that its key is not used: null, false, zero, or nothing in it."""
    return value in (None, False, 0, "", [], {}) or (
        isinstance(value, str) and value.lower() in ("false", "none", "no")
    )


def text(value: Any) -> str:
    """Text, as it is.

    Raises:
        UserError: anything else, here and below.
    """
    if not isinstance(value, str) or not value:
        raise UserError(f"expected text, got {_shown(value)}")
    return value


def number(value: Any) -> float:
    """A number, also one in quotes such as ``"2e-4"``."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"expected a number, got {_shown(value)}")
    return value


def whole(value: Any) -> int:
    """A whole number; ``4.0`` is one."""
    found = number(value)
    if found != int(found):
        raise UserError(f"expected a whole number, got {_shown(value)}")
    return int(found)


def count(value: Any) -> int:
    """A whole number of at least 1."""
    if whole(value) < 1:
        raise UserError(f"expected at least 1, got {_shown(value)}")
    return whole(value)


def steps(value: Any) -> float:
    """A number of steps, or a share of them below 1."""
    found = number(value)
    return found if 0 < found < 1 else whole(value)


def flag(value: Any) -> bool:
    """True or false, also as YAML 1.1 writes them."""
    word = str(value).lower()
    if word not in _TRUE + _FALSE:
        raise UserError(f"expected true or false, got {_shown(value)}")
    return word in _TRUE


def texts(value: Any) -> list[str]:
    """A list of text, or one text with commas."""
    found = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found or not all(isinstance(part, str) and part for part in found):
        raise UserError(f"expected a list of text, got {_shown(value)}")
    return list(found)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise UserError(f"expected a mapping, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"{value}, which is computed" if isinstance(value, NotLiteral) else shown(value)
