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
    """The types that may stand at this path."""
    kinds: list[Any] = [Recipe]
    for part in parts:
        fields = [kind.model_fields.get(str(part)) for kind in kinds if _is_section(kind)]
        inner = [field.annotation for field in fields if field is not None]
        inner += [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
        kinds = [member for annotation in inner for member in _alternatives(annotation)]
    return kinds


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
