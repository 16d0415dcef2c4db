"""Reading a recipe: YAML, overrides, schema, rules. Every fault is one line that names its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel

from deltatune.config.defaults import differs
from deltatune.config.explain import dotted, explain, known_keys, names_free_mapping, shown
from deltatune.config.rules import check_recipe, recipe_errors
from deltatune.config.schema import Recipe
from deltatune.config.ways_out import ways_out
from deltatune.config.yaml_text import KeyPath, dump_yaml, parse_document
from deltatune.errors import UserError, user_path

__all__ = ["LoadedRecipe", "dump_recipe", "load_recipe", "parse_recipe"]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that may run, and what its reader should know."""

    recipe: Recipe  # validated, with every default filled in
    warnings: list[str]  # one line each
    places: Mapping[KeyPath, str]  # where its keys stand: file and line, or the --set that brought them


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and checks a recipe, without torch or transformers.

    What needs them is checked where they are used: TrainingArguments' names beyond those of the schema
    (``rules.check_training_names``), targets of adapters, kernels.

    Args:
        path: a YAML file.
        overrides: ``"a.b=value"`` each, the value in YAML; a number in the path is a position in a list.

    Raises:
        UserError: no such file, broken YAML, an unknown key, a wrong type, or a violated rule.
    """
    return parse_recipe(_read(user_path(path)), str(path), overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Checks the text of a recipe, as ``load_recipe`` does that of a file; ``name`` stands in errors for the file.

    Raises:
        UserError: broken YAML, an unknown key, a wrong type, or a violated rule.
    """
    data, lines = parse_document(text, name)
    if data is None:
        raise UserError(f"{name}: the recipe is empty; it needs at least model.name_or_path and data.train")
    places: dict[KeyPath, str] = {(): name, **{key: f"{name}:{line}" for key, line in lines.items()}}
    for override in overrides:
        _override(data, override, places)
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, data, places)) from error
    try:
        return LoadedRecipe(recipe, check_recipe(recipe), places)
    except UserError as error:
        way_out = ways_out(recipe_errors(recipe), data, places) if overrides else ""
        raise UserError(f"{name}: {error}{way_out}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with its defaults written out, but for those that say nothing (null, empty lists, mappings).

    ``load_recipe`` reads it back as the same recipe.
    """
    dumped = recipe.model_dump(mode="json")
    return dump_yaml(_telling(recipe, {**dumped, "compile": dumped["compile"] or False}))


def _telling(section: BaseModel, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """What a section says, without defaults that say nothing; a null that is no default stays."""
    kept: dict[str, Any] = {}
    for name, value in dumped.items():
        given = getattr(section, name)
        if name in type(section).model_fields and value in (None, [], {}) and not differs(section, name):
            continue
        if isinstance(given, BaseModel):
            value = _telling(given, value)
        elif isinstance(given, tuple):
            parts = zip(given, value, strict=True)
            value = [_telling(part, item) if isinstance(part, BaseModel) else item for part, item in parts]
        kept[name] = value
    return kept


def _override(data: Any, override: str, places: dict[KeyPath, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key=value, such as --set training.max_steps=100")
    value, _ = parse_document(text, f"--set {key}")
    parts = tuple(_parts(key.strip()))
    _assign(data, parts, value, f"--set {override}")
    # what it replaced stands on no line any more; sections on the way that no line has are its own
    for replaced in [place for place in places if place[: len(parts)] == parts]:
        del places[replaced]
    for depth in range(1, len(parts) + 1):
        places.setdefault(parts[:depth], f"--set {override}")


def _read(path: Path) -> str:
    if path.suffix in (".jsonl", ".ndjson", ".parquet") and path.is_file():
        raise UserError(
            f"{path}: expected a recipe (a YAML file), got data; the recipe names it, "
            f"or --set data.train.0.path={path} does"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such recipe") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        found = "a folder" if isinstance(error, OSError) else "bytes that are no UTF-8 text"
        raise UserError(f"{path}: expected a YAML file, got {found}") from error


def _parts(key: str) -> list[str | int]:
    parts: list[str | int] = []
    words = key.split(".")
    while words:
        if parts and names_free_mapping(parts):
            return [*parts, ".".join(words)]
        word = words.pop(0)
        parts.append(int(word) if word.isdigit() else word)
    return parts


def _assign(data: Any, parts: KeyPath, value: Any, override: str) -> None:
    """Puts a value where the parts lead; sections and lists on the way that are not there are made."""
    parent = data
    for depth, part in enumerate(parts, start=1):
        here, last = parts[:depth], depth == len(parts)
        _check_step(parent, here, override)
        new = value if last else [] if isinstance(parts[depth], int) else {}
        if isinstance(parent, list) and part == len(parent):
            parent.append(new)
        # `compile: true` is the section with its defaults
        elif last or (isinstance(parent, dict) and part not in parent) or (parent[part] is True and known_keys(here)):
            parent[part] = new
        parent = parent[part]


def _check_step(parent: Any, parts: KeyPath, override: str) -> None:
    part, where = parts[-1], dotted(parts[:-1])
    if isinstance(parent, list):
        if not isinstance(part, int) or part > len(parent):
            raise UserError(f"{override}: {where} is a list of {len(parent)}; expected a position up to {len(parent)}")
    elif not isinstance(parent, dict):
        # an empty section takes its defaults
        way_out = f"pass --set {where}={{}} before it" if known_keys(parts[:-1]) else f"set {where} itself"
        raise UserError(f"{override}: {where} is {shown(parent)} in the recipe; {way_out}")
