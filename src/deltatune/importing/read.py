"""A file of another project: which one's it is, and its keys."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deltatune.config.yaml_text import parse_document
from deltatune.errors import UserError, near_files, one_line, user_path
from deltatune.importing.axolotl import AXOLOTL
from deltatune.importing.command_line import settings_of_command
from deltatune.importing.llama_factory import LLAMA_FACTORY
from deltatune.importing.rules import Table
from deltatune.importing.trl import TRL
from deltatune.importing.unsloth import UNSLOTH, settings_of_script

__all__ = ["KINDS", "Foreign", "Kind", "read_foreign"]

Kind = Literal["axolotl", "llamafactory", "trl", "unsloth"]
KINDS: Mapping[Kind, Table] = {"axolotl": AXOLOTL, "llamafactory": LLAMA_FACTORY, "trl": TRL, "unsloth": UNSLOTH}


_OF_YAML: tuple[Kind, ...] = ("axolotl", "llamafactory", "trl")
# TRL's own trainer in a script is called with the same arguments
_OF_PYTHON: tuple[Kind, ...] = ("unsloth", "trl")
_SUFFIXES = {".yaml": _OF_YAML, ".yml": _OF_YAML, ".json": _OF_YAML, ".py": _OF_PYTHON, ".ipynb": _OF_PYTHON}


@dataclass(frozen=True)
class Foreign:
    """Another project's recipe as it stands in its file."""

    path: Path
    table: Table
    settings: Mapping[str, Any]


def read_foreign(path: str | Path, kind: Kind | None = None) -> Foreign:
    """Reads a file; what kind it is of is told by its ending and its keys unless ``kind`` says it.

    Raises:
        UserError: no such file, one that is broken, or one of which the kind is not told.
    """
    path = user_path(path)
    text = _text(path)
    written = _SUFFIXES.get(path.suffix, ("trl",))
    if kind is not None and kind not in written:
        raise UserError(f"{path}: --from {kind} cannot be; a file {path.name} is read as {' or '.join(written)}")
    if "unsloth" in written:
        return Foreign(path, UNSLOTH, settings_of_script(path, text))
    if written == ("trl",):
        settings = settings_of_command(path, text)
        return Foreign(path, TRL, _with_config(path, settings))
    settings = _mapping(path, _json(path, text) if path.suffix == ".json" else parse_document(text, str(path))[0])
    return Foreign(path, KINDS[kind or _kind(path, settings)], settings)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file{near_files(path)}") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file, got {'a folder' if path.is_dir() else 'bytes'}") from error


def _mapping(path: Path, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(settings).__name__}")
    return settings


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UserError(f"{path}: {twice} is given twice")
    return found


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=partial(_once, path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {one_line(error)}") from error


def _with_config(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``--config FILE`` under those of the command line, which win."""
    for config in (Path(str(settings.get("config", ""))), path.parent / str(settings.get("config", ""))):
        if config.suffix in (".yaml", ".yml") and config.is_file():
            inner, _ = parse_document(_text(config), str(config))
            return {
                **_mapping(config, inner or {}),
                **{key: value for key, value in settings.items() if key != "config"},
            }
    return settings


def _kind(path: Path, settings: Mapping[str, Any]) -> Kind:
    found: dict[Kind, list[str]] = {}
    for kind, table in KINDS.items():
        marks = [key for key in settings if key in table.marks]
        if marks:
            found[kind] = marks
    if len(found) == 1:
        return next(iter(found))
    if not found and {"model", "training", "data"} & set(settings):
        raise UserError(f"{path}: this is a recipe of deltatune's own already")
    said = "; ".join(f"{kind} by {', '.join(marks[:3])}" for kind, marks in found.items())
    why = f"more than one fits: {said}" if found else "none of their own keys is there"
    raise UserError(f"{path}: whose file this is cannot be told ({why}); say --from axolotl, llamafactory or trl")
