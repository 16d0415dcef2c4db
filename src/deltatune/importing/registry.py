"""LLaMA-Factory's data sets: names in a dataset_info.json, and what stands there, as sources of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltatune.config.explain import shown
from deltatune.errors import UserError, one_line
from deltatune.importing.rules import Outcome, Row
from deltatune.importing.values import mapping, text, texts

__all__ = ["Registry", "find_registry", "named_sources"]

_FILE = "dataset_info.json"
_OF_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_OF_MESSAGES = {"messages": "messages"}
_ANSWERS = {"chosen": "chosen", "rejected": "rejected"}
_OF_BOTH = {"system": "system", "tools": "tools"}
_DEFAULT_MESSAGES = "conversations"
_ROLES = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "system_tag": ("system", "system"),
    "observation_tag": ("tool", "observation"),
}
_MEDIA = ("images", "videos", "audios")


class Registry:
    """The data sets that a dataset_info.json names."""

    def __init__(self, folder: Path, entries: Mapping[str, Any]) -> None:
        self.folder = folder
        self.entries = entries


def find_registry(dataset_dir: str, recipe: Path) -> Registry | None:
    """The registry in ``dataset_dir``, seen from here or from the recipe's folder, or the one beside the recipe.

    Raises:
        UserError: one that is no JSON object.
    """
    for folder in (Path(dataset_dir), recipe.parent / dataset_dir, recipe.parent):
        path = folder / _FILE
        if path.is_file():
            try:
                entries = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: broken JSON: {one_line(error)}") from error
            if not isinstance(entries, dict):
                raise UserError(f"{path}: expected a mapping of names, got {shown(entries)}")
            return Registry(folder, entries)
    return None


def named_sources(part: str, names: Any, registry: Registry | None, dataset_dir: str, limit: Any) -> list[Row]:
    """A row for each name, and for each key of its entry.

    Args:
        part: train or eval.
        names: text with commas, or a list.
        registry: where names are looked up.
        dataset_dir: where files are expected that no registry names.
        limit: rows of each source, as ``max_samples`` says; or None.
    """
    rows: list[Row] = []
    for index, name in enumerate(texts(names)):
        where = f"data.{part}.{index}"
        limited = {} if limit is None else {f"{where}.limit": limit}
        if registry is None or name not in registry.entries:
            missing = f"no {_FILE} in {dataset_dir} or beside the file" if registry is None else f"not in {_FILE}"
            outcome = Outcome(
                "not supported",
                {f"{where}.path": f"{dataset_dir}/{name}.json", **limited},
                f"{missing}: a guess stands there; name the file",
            )
            rows.append(Row(name, name, outcome))
            continue
        entry = mapping(registry.entries[name])
        rows += [Row(f"{name}.{key}", value, outcome) for key, value, outcome in _entry(where, entry, registry.folder)]
        rows.append(Row(name, name, Outcome("carried", {**_format(where, entry), **limited})))
    return rows


def _format(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the entry means without saying it."""
    paired = bool(entry.get("ranking"))
    if entry.get("formatting", "alpaca") == "alpaca":
        return {f"{where}.format": "preference" if paired else "alpaca"}
    columns = mapping(entry.get("columns", {}))
    role = "prompt" if paired else "messages"
    found = {f"{where}.format": "preference" if paired else "chat"}
    found[f"{where}.columns.{role}"] = columns.get("messages", _DEFAULT_MESSAGES)
    tags = mapping(entry.get("tags", {}))
    for field, default, ours in (("role_tag", "from", "role"), ("content_tag", "value", "content")):
        found[f"{where}.message_fields.{ours}"] = tags.get(field, default)
    for tag, (role, default) in _ROLES.items():
        if tags.get(tag, default) not in (default, role):
            found[f"data.roles.{tags[tag]}"] = role
    return found


def _entry(where: str, entry: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any, Outcome]]:
    from_hub = "hf_hub_url" in entry
    for key, value in entry.items():
        if key == "hf_hub_url":
            yield key, value, Outcome("carried", {f"{where}.path": value})
        elif key in ("file_name", "ms_hub_url", "om_hub_url", "script_url") and from_hub:
            yield key, value, Outcome("no effect here", why="hf_hub_url is given, which wins")
        elif key == "file_name":
            yield key, value, Outcome("carried", {f"{where}.path": str(folder / text(value))})
        elif key in ("subset", "split"):
            ours = "name" if key == "subset" else "split"
            yield key, value, Outcome("carried", {f"{where}.{ours}": value})
        elif key == "num_samples":
            yield key, value, Outcome("changed", {f"{where}.limit": value}, "the first so many rows, not random ones")
        elif key == "formatting":
            yield key, value, Outcome("carried" if value in ("alpaca", "sharegpt", "openai") else "unknown")
        elif key == "columns":
            yield from _columns(where, value, entry.get("formatting", "alpaca"), paired=bool(entry.get("ranking")))
        elif key == "tags":
            for tag, name in mapping(value).items():
                known = tag in _ROLES or tag in ("role_tag", "content_tag", "function_tag")
                yield f"tags.{tag}", name, Outcome("carried" if known else "unknown")
        elif key == "ranking":
            yield key, value, Outcome("carried", why="pairs of answers" if value else "")
        else:
            yield key, value, Outcome("not supported", why="no such source here: a file, a folder or the Hub")


def _columns(where: str, columns: Any, formatting: str, *, paired: bool) -> Iterator[tuple[str, Any, Outcome]]:
    known = {**(_OF_ALPACA if formatting == "alpaca" else _OF_MESSAGES), **_OF_BOTH}
    if paired:
        known |= {**_ANSWERS, **({"messages": "prompt"} if "messages" in known else {})}
    for role, name in mapping(columns).items():
        if role in _MEDIA:
            outcome = Outcome("not supported", why="text alone trains here")
        elif role not in known:
            outcome = Outcome("not supported", why="no column of such rows here")
        else:
            outcome = Outcome("carried", {f"{where}.columns.{known[role]}": name})
        yield f"columns.{role}", name, outcome
