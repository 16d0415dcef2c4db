"""What the schema says about a place in a recipe, given as the parts of its dotted path."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from deltatune.config.schema import Recipe

__all__ = ["dotted", "known_keys", "names_free_mapping"]


def dotted(parts: Sequence[str | int]) -> str:
    """``("data", "train", 0)`` as ``data.train.0``."""
    return ".".join(str(part) for part in parts)


def known_keys(parts: Sequence[str | int]) -> list[str]:
    """The keys of the section at this path; none where there is no section."""
    return [key for kind in _kinds_at(parts) if _is_section(kind) for key in kind.model_fields]


def names_free_mapping(parts: Sequence[str | int]) -> bool:
    """Whether the keys at this path are the user's own: they may hold dots."""
    return any(get_origin(kind) is dict for kind in _kinds_at(parts))


def _kinds_at(parts: Sequence[str | int]) -> list[Any]:
    kinds: list[Any] = [Recipe]
    for part in parts:
        kinds = [inner for kind in kinds for inner in _step(kind, part)]
    return kinds


def _step(kind: Any, part: str | int) -> list[Any]:
    if _is_section(kind):
        field = kind.model_fields.get(str(part))
        return [] if field is None else _alternatives(field.annotation)
    if get_origin(kind) is tuple:
        return _alternatives(get_args(kind)[0])
    return []


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
