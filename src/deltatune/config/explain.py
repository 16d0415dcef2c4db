"""Places in a recipe: what the schema has there, and pydantic's findings there as one line each."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deltatune.config.refused import PASSED_TRAINING_NAMES
from deltatune.config.schema import Recipe
from deltatune.config.yaml_text import KeyPath
from deltatune.errors import nearest

__all__ = ["default_at", "dotted", "explain", "known_keys", "names_free_mapping", "place_of", "shown"]

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "model_attributes_type": "a section (a mapping of keys)",
    "model_type": "a section (a mapping of keys)",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "text that is not empty",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "union_tag_invalid": "a section whose {discriminator} is one of {expected_tags}",
}


def explain(error: ValidationError, data: Any, places: Mapping[KeyPath, str]) -> str:
    """All findings in one line, each with its place: file and line, or the ``--set`` that brought it."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False, include_context=True):
        found.setdefault(_real_path(details["loc"], data), []).append(details)
    # a union reports every alternative: where one of them got further, only that one is what was meant
    deepest = [path for path in found if not any(other != path and other[: len(path)] == path for other in found)]
    order = {path: position for position, path in enumerate(places)}
    deepest.sort(key=lambda path: order.get(path, 0))
    return "; also: ".join(f"{place_of(path, places)}: {_finding(path, found[path])}" for path in deepest)


def _real_path(loc: Sequence[str | int], data: Any) -> KeyPath:
    """``loc`` without the names of union members, which are no part of the file."""
    path: list[str | int] = []
    value = data
    for position, part in enumerate(loc):
        if isinstance(value, Mapping) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif position != len(loc) - 1 or part not in known_keys(path):
            continue
        path.append(part)
    return tuple(path)


def place_of(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where a key stands; of one that stands nowhere, where the section does that would hold it."""
    while path not in places:
        path = path[:-1]
    return places[path]


def _finding(path: KeyPath, findings: list[ErrorDetails]) -> str:
    first = findings[0]
    if first["type"] == "missing":
        return f"{dotted(path)} is missing"
    if first["type"] == "extra_forbidden":
        keys = [key for key in known_keys(path[:-1]) if key != path[-1]]  # one of another alternative may go by it
        close = nearest(str(path[-1]), keys) or _in_a_section(path)
        return f"{dotted(path)}: unknown key{close}; expected one of {', '.join(keys)}"
    keys_at_fault = [finding for finding in findings if finding["loc"][-1:] == ("[key]",)]
    if keys_at_fault:
        allowed = _expected(keys_at_fault[0])
        choices = allowed.replace(" or ", ", ").replace("'", "").split(", ")
        return f"{dotted(path)}: unknown key{nearest(str(path[-1]), choices)}; expected {allowed}"
    expected = " or ".join(dict.fromkeys(_expected(finding) for finding in findings))
    words = re.findall(r"'([^']+)'", expected)
    close = nearest(first["input"], words) if isinstance(first["input"], str) else ""
    return f"{dotted(path) or 'the recipe'}: expected {expected}, got {shown(first['input'])}{close}"


def _in_a_section(path: KeyPath) -> str:
    """``" (did you mean training.learning_rate?)"`` for a key that stands outside the section it belongs into."""
    if len(path) > 1:
        return ""
    found = [f"{section}.{path[0]}" for section in known_keys(()) if path[0] in known_keys((section,))]
    found += [f"training.{path[0]}"] if path[0] in PASSED_TRAINING_NAMES else []
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _expected(finding: ErrorDetails) -> str:
    if finding["type"] in _EXPECTED:
        return _EXPECTED[finding["type"]].format(**finding.get("ctx", {}))
    return finding["msg"].removeprefix("Input should be ")


def shown(value: Any) -> str:
    """A value as it stands in a recipe, cut short where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(parts: Sequence[str | int]) -> str:
    """``("data", "train", 0)`` as ``data.train.0``."""
    return ".".join(str(part) for part in parts)


def known_keys(parts: Sequence[str | int]) -> list[str]:
    """The keys of the section at this path; none where there is no section."""
    return list(dict.fromkeys(key for kind in _kinds_at(parts) if _is_section(kind) for key in kind.model_fields))


def default_at(parts: Sequence[str | int]) -> object:
    """The default of the field at this path.

    Raises:
        KeyError: there is no such field, it must be given, or it is a section that is always there.
    """
    for kind in _kinds_at(parts[:-1]):
        field = kind.model_fields.get(str(parts[-1])) if _is_section(kind) else None
        if field is not None and not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data={})
            if not isinstance(default, BaseModel):
                return default
    raise KeyError(dotted(parts))


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
