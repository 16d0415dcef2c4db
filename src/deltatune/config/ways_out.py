"""A clash with a key of the file, in a recipe that overrides have changed: the override that ends it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from deltatune.config.explain import default_at, dotted, known_keys
from deltatune.config.rules import recipe_errors
from deltatune.config.schema import Recipe
from deltatune.config.yaml_text import KeyPath

__all__ = ["ways_out"]


def ways_out(errors: list[str], data: Any, places: Mapping[KeyPath, str]) -> str:
    """What an error of rules adds for the command line: keys that stand in the file, with their lines, and a ``--set``.

    A key's default is named where it ends one of the errors, and otherwise that the key can be set at all. Nothing is
    added where no key that the errors name stands in the file.

    Args:
        errors: of the rules.
        data: the recipe as it was read, overrides included.
        places: where its keys stand.
    """
    named = [path for path in places if path and not places[path].startswith("--set") and _is_named(path, errors)]
    found = [f"--set {setting} ({places[path]})" for path in named for setting in _ends(path, len(errors), data)]
    if not found:
        settable = [path for path in named if not known_keys(path) and dotted(path) in "".join(errors)]
        found = [f"--set {dotted(path)}=VALUE ({places[path]})" for path in settable]
    return f"; for this run alone: {' or '.join(found)}" if found else ""


def _is_named(path: KeyPath, errors: list[str]) -> bool:
    """Whether an error names a key, in full or by its last part alone."""
    names = {dotted(path), str(path[-1])}
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\.?\w)", error) for name in names for error in errors)


def _ends(path: KeyPath, num_errors: int, data: Any) -> Iterator[str]:
    """The override that brings a key back to its default, if there are fewer errors with it."""
    try:
        default = default_at(path)
    except KeyError:
        return
    changed = copy.deepcopy(data)
    parent = changed
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = default
    try:
        ends = len(recipe_errors(Recipe.model_validate(changed))) < num_errors
    except ValidationError:
        return
    if ends:
        yield f"{dotted(path)}={default if isinstance(default, str) else json.dumps(default)}"
