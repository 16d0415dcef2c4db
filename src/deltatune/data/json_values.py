"""Values of rows: JSON text parsed, broken text refused, and the nulls of columnar files taken out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deltatune.errors import DataError

__all__ = ["check_values", "drop_nulls", "holds_null", "parse_json", "shown", "unreadable"]

_MAX_DEPTH = 100  # levels; templates, JSON writers and this module go down by recursion
_MAX_BITS = 14_000  # of a whole number: Python writes no more than 4300 digits


def parse_json(text: str, what: str) -> Any:
    """The value of JSON text inside a row; ``what`` names it, in the plural.

    Raises:
        DataError: no JSON, or values that ``check_values`` refuses.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} are not JSON: {error}, got {shown(text)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {unreadable(error)}") from None
    check_values(value, what)
    return value


def unreadable(error: ValueError | RecursionError) -> str:
    """Why well-formed JSON was not read, and the remedy."""
    if isinstance(error, RecursionError):
        return f"values are nested deeper than {_MAX_DEPTH} levels; flatten them, or remove the row"
    return "a whole number has more than 4300 digits; write it as text, or remove the row"


def check_values(value: Any, where: str) -> None:
    """Refuses what no tokenizer or template takes, at any depth and in keys too.

    Raises:
        DataError: half of a surrogate pair, nesting deeper than 100 levels, a whole number of thousands of digits.
    """
    if _is_sound(value):
        return
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_text(str(name), where)
            _check(item, f"{where}: {name}", 1)
    else:
        _check(value, where, 0)


def _is_sound(value: Any) -> bool:
    """Whether nothing is refused, found in one pass by the JSON encoder; False where that does not tell."""
    if isinstance(value, Mapping) and any(isinstance(item, list) and _of_numbers(item) for item in value.values()):
        return False  # the tokens of a row are many, and faster to look at than to write
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        return False
    return text.count("[") + text.count("{") <= _MAX_DEPTH


def _of_numbers(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], int)


def _check(value: Any, where: str, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise DataError(f"{where}: {unreadable(ValueError())}")
    elif isinstance(value, Mapping | list | tuple):
        if depth >= _MAX_DEPTH:
            raise DataError(f"{where}: {unreadable(RecursionError())}")
        if isinstance(value, Mapping):
            for name in value:
                _check_text(str(name), where)
            value = value.values()
        elif set(map(type, value)) == {int}:
            value = (min(value), max(value))  # the tokens of a row are many
        for item in value:
            _check(item, where, depth + 1)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.start + 1])
        raise DataError(
            f"{where} holds half a character: {text[error.start]!a} is one half of a surrogate pair, "
            f"at the end of {near}; text was cut there, so mend it or remove the row"
        ) from None


def drop_nulls(value: Any) -> Any:
    """The value without keys that are null, at every depth; items of lists stay."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def holds_null(value: Any) -> bool:
    """Whether ``drop_nulls`` would take a key out."""
    if isinstance(value, Mapping):
        return any(item is None or holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(holds_null, value))


def shown(value: Any) -> str:
    """Type and value for an error, cut short."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
