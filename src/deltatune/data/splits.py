"""The splits of a folder of files, by the rules of the Hub: what its README configures, or the names of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import yaml

from deltatune.data.files import SUFFIXES, files_below, files_matching
from deltatune.errors import DataError, nearest, one_line

__all__ = ["Splits", "folder_splits", "saved_splits"]

Splits = dict[str, list[Path]]

# the names that https://huggingface.co/docs/datasets/repository_structure tells splits by, in its order of preference
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_BEFORE, _AFTER = r"(?:.*[-._ 0-9])?", r"[-._ 0-9].*"
_FOLDER_NAMES = {
    split: re.compile(f"{_BEFORE}(?:{words})(?:{_AFTER})?", re.DOTALL) for split, words in _KEYWORDS.items()
}
_FILE_NAMES = {split: re.compile(f"{_BEFORE}(?:{words}){_AFTER}", re.DOTALL) for split, words in _KEYWORDS.items()}


def saved_splits(folder: Path, config: str | None) -> Splits | None:
    """The splits of a folder that ``save_to_disk`` of ``datasets`` wrote, each a folder of its own.

    Returns:
        ``{"": [folder]}`` for a saved ``Dataset``, which has no splits; ``None`` for any other folder.

    Raises:
        DataError: a configuration is asked for, or the list of splits cannot be read.
    """
    listed = folder / "dataset_dict.json"
    if listed.is_file():
        try:
            names = [str(name) for name in json.loads(listed.read_text(encoding="utf-8"))["splits"]]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(f"{listed} cannot be read: {one_line(error)}; save the data set again") from error
        splits = {name: [folder / name] for name in names}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        splits = {"": [folder]}
    else:
        return None
    if config is not None:
        raise DataError(f"name: {config} cannot act on {folder}, a data set that was saved to disk; leave it out")
    return splits


def folder_splits(folder: Path, config: str | None) -> Splits:
    """The data files of each split of a folder: split to files; all of them are ``train`` where no name tells.

    Args:
        folder: has data files in it, at any depth.
        config: one of the configurations that the folder's README.md lists; its default one if ``None``.

    Raises:
        DataError: no data files, no such configuration, or one that cannot be read.
    """
    configs = _readme_configs(folder)
    if configs:
        return _configured(folder, configs, config)
    if config is not None:
        raise DataError(f"name: {config} cannot act on {folder}: it has no README.md that lists configurations")
    return _splits_by_name(folder)


def _splits_by_name(folder: Path) -> Splits:
    files = {file.relative_to(folder): file for file in files_below(folder)}
    if not files:
        raise DataError(f"{folder} holds no data files; expected {', '.join(SUFFIXES)}")
    shards: Splits = {}
    for name, file in files.items():
        match = _SHARD.fullmatch(name.name)
        if name.parent == PurePath("data") and match:
            shards.setdefault(match[1], []).append(file)
    if shards:
        return shards
    for patterns, parts in ((_FOLDER_NAMES, _folder_parts), (_FILE_NAMES, _file_part)):
        found = {
            split: [file for name, file in files.items() if any(pattern.fullmatch(part) for part in parts(name))]
            for split, pattern in patterns.items()
        }
        if any(found.values()):
            return {split: chosen for split, chosen in found.items() if chosen}
    return {"train": list(files.values())}


def _folder_parts(name: PurePath) -> Iterable[str]:
    return name.parent.parts


def _file_part(name: PurePath) -> Iterable[str]:
    return (name.name,)


def _readme_configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The configurations in the YAML block at the head of README.md, by name."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        head = re.match(r"---\s*\n(.*?\n)---", readme.read_text(encoding="utf-8-sig"), re.DOTALL)
        card = yaml.safe_load(head[1]) if head else None
        listed = card.get("configs") if isinstance(card, dict) else None
        return {str(config["config_name"]): config for config in listed or ()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError) as error:
        raise DataError(f"{readme} lists its configurations in a way that cannot be read: {one_line(error)}") from error


def _configured(folder: Path, configs: Mapping[str, Mapping[str, Any]], name: str | None) -> Splits:
    if name is None:
        default = [key for key, config in configs.items() if config.get("default") or key == "default"] or list(configs)
        if len(default) > 1:
            raise DataError(f"{folder} has the configurations {', '.join(configs)}; choose one of them with name")
        name = default[0]
    if name not in configs:
        raise DataError(f"{folder} has no configuration {name}{nearest(name, configs)}; it has {', '.join(configs)}")
    where, below = f"{folder / 'README.md'} ({name})", folder / str(configs[name].get("data_dir") or "")
    listed = configs[name].get("data_files")
    if listed is None:
        return _splits_by_name(below)
    splits: Splits = {}
    try:
        for entry in [listed] if isinstance(listed, str) else listed:
            split, patterns = ("train", entry) if isinstance(entry, str) else (str(entry["split"]), entry["path"])
            found = [
                _matching(below, pattern, where) for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            ]
            splits[split] = list(dict.fromkeys([*splits.get(split, ()), *chain.from_iterable(found)]))
    except (LookupError, TypeError) as error:
        raise DataError(f"{where}: data_files cannot be read: {one_line(error)}") from error
    if not splits:
        raise DataError(f"{where}: data_files names no files; expected patterns such as data/*.jsonl")
    return splits


def _matching(folder: Path, pattern: str, where: str) -> list[Path]:
    if "://" in pattern or PurePath(pattern).is_absolute():
        raise DataError(f"{where} names {pattern}; expected files below the folder")
    files = files_matching(folder, pattern)
    if not files:
        raise DataError(f"{where} names {pattern}, which matches no data file; expected {', '.join(SUFFIXES)}")
    return files
