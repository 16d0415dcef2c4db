"""Tensors of a base checkpoint that its model class does not load, such as heads for several tokens at once.

A model that was loaded and saved again has lost them, while its config still speaks of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltatune.hf import model as hf_model

__all__ = ["add_tensors", "has_weight_files", "not_loaded", "other_dtypes", "weight_files"]

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def has_weight_files(folder: Path) -> bool:
    """Whether a checkpoint is one of safetensors, whatever they hold."""
    return any((folder / name).is_file() for name in (_INDEX, _SINGLE))


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file that each tensor of a checkpoint is in; nothing where it has none."""
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not (folder / _SINGLE).is_file():
        return {}
    with safe_open(folder / _SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


def not_loaded(base: Path, saved: Path, model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Names in the base checkpoint that are no weights of the model that was loaded from it and saved.

    Names that are only missing from ``saved`` do not count: a tied weight is saved once, and old names are renamed.
    """
    declared: Iterable[str] = getattr(hf_model.base_model(model), "_keys_to_ignore_on_load_unexpected", None) or ()
    known = set(unexpected)
    absent = weight_files(base).keys() - weight_files(saved).keys()
    return sorted(name for name in absent if name in known or any(re.search(each, name) for each in declared))


def other_dtypes(base: Path, saved: Path) -> list[str]:
    """Names of tensors whose dtype alone differs: the base holds some in another one than the model computes in."""
    theirs, ours = weight_files(base), weight_files(saved)
    before, after = _dtypes(theirs), _dtypes(ours)
    differing = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    loaded = dict(_read(ours, differing))
    return sorted(name for name, t in _read(theirs, differing) if torch.equal(t.to(loaded[name].dtype), loaded[name]))


def add_tensors(base: Path, names: Iterable[str], saved: Path) -> None:
    """Puts tensors of the base, as they are there, into a saved checkpoint: over those it has, and beside them."""
    theirs, ours = weight_files(base), weight_files(saved)
    last = max(ours.values())
    into: dict[Path, set[str]] = {}
    for name in names:
        into.setdefault(ours.get(name, last), set()).add(name)
    for file, wanted in into.items():
        tensors = load_file(file) | dict(_read(theirs, wanted))
        part = file.with_suffix(".part")
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(file)
    if (saved / _INDEX).is_file():
        index: dict[str, Any] = json.loads((saved / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"] |= {name: file.name for file, wanted in into.items() for name in wanted}
        files = {name: saved / file for name, file in index["weight_map"].items()}
        index["metadata"]["total_size"] = sum(tensor.nbytes for _, tensor in _read(files, files.keys()))
        (saved / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _dtypes(files: Mapping[str, Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def _read(files: Mapping[str, Path], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for path in sorted({files[name] for name in names}):
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in sorted(names) if files[name] == path)
