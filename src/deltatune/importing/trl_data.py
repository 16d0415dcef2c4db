"""The data sets of TRL's settings, and of recipes of the alignment handbook around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from deltatune.importing.paths import READERS, is_data_file, path_of
from deltatune.importing.rules import Outcome, Row, Rule, Settings, alone, carried, idle, other, refused
from deltatune.importing.values import flag, is_off, mapping, number, text, texts, whole

__all__ = ["DATA", "SECTIONS", "evaluates"]


def evaluates(settings: Settings) -> bool:
    """Whether held-out data is looked at, by today's name of the setting or the one before it."""
    when = settings.get("eval_strategy", settings.get("evaluation_strategy"))
    return when not in (None, False, "no")


def _test_split(value: Any, settings: Settings) -> Outcome:
    if not evaluates(settings) or is_off(settings.get("dataset_name")):
        return Outcome("no effect here", why="nothing is evaluated")
    if is_data_file(settings["dataset_name"]):
        return Outcome("not supported", why="a file is one split, train: set data.val_size, or data.eval")
    writes = {"data.eval.0.path": other(settings, "dataset_name", text), "data.eval.0.split": text(value)}
    if not is_off(settings.get("dataset_config")):
        writes["data.eval.0.name"] = other(settings, "dataset_config", text)
    return Outcome("carried", writes)


def _train_split(value: Any, settings: Settings) -> Outcome:
    if is_data_file(settings.get("dataset_name")) and value == "train":
        return Outcome("no effect here", why="a file is one split, train")
    return Outcome("carried", {"data.train.0.split": text(value)})


@alone
def _test_size(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    return Outcome("carried", {"data.val_size": number(value) if number(value) < 1 else whole(value)})


def _fraction(where: str) -> Rule:
    @alone
    def rule(value: Any) -> Outcome:
        if value is None:
            return Outcome("no effect here", why="not set")
        writes = {f"{where}.weight": number(value), "data.weight_by": "documents"}
        return Outcome("changed", writes, "a share of the documents; each epoch takes the next part of a source")

    return rule


@alone
def _weight(value: Any) -> Outcome:
    if value in (1, None):
        return Outcome("no effect here", why="all rows are taken")
    return Outcome("not supported", why=f"{value} of its rows: a slice of the split takes a part, such as train[:10%]")


def _files(where: str) -> Rule:
    def rule(value: Any, entry: Settings) -> Outcome:
        files = texts(value) if isinstance(value, str | list) else []
        if entry.get("path") not in READERS or not files:
            return Outcome("not supported", why="name the file, or a pattern, as the path")
        why = "" if len(files) == 1 else "the first alone; give a pattern, or a source each"
        return Outcome("not supported" if why else "carried", {f"{where}.path": files[0]}, why)

    return rule


def _data(value: Any, settings: Settings, here: Path) -> list[Row]:
    del settings, here
    rows: list[Row] = []
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"data.train.{index}"
        rules: dict[str, Rule] = {
            **dict.fromkeys(("path", "id"), path_of(where)),
            **dict.fromkeys(("name", "config"), carried(f"{where}.name", text)),
            "split": carried(f"{where}.split", text),
            "columns": idle("columns that no format reads are left alone"),
            "fraction": _fraction(where),
            "weight": _weight,
            "data_files": _files(where),
            "data_dir": refused("name the folder as the path"),
        }
        for key, inner in mapping(entry).items():
            rule = rules.get(key)
            outcome = (
                Outcome("unknown", why="no key of a data set that is known") if rule is None else rule(inner, entry)
            )
            rows.append(Row(f"{index}.{key}", inner, outcome))
    return rows


def _mixture(value: Any, settings: Settings, here: Path) -> list[Row]:
    """``dataset_mixture`` of recipes of the alignment handbook, around the same list."""
    rows: list[Row] = []
    for key, inner in mapping(value).items():
        if key == "datasets":
            rows += [replace(row, key=f"datasets.{row.key}") for row in _data(inner, settings, here)]
        elif key == "test_split_size":
            rows.append(Row(key, inner, _test_size(inner, settings)))
        else:
            rows.append(Row(key, inner, Outcome("no effect here", why="training.seed orders the data")))
    return rows


def _mixer(value: Any, settings: Settings, here: Path) -> list[Row]:
    """``dataset_mixer``: names to the share of their rows that is taken, each in all of ``dataset_splits``."""
    del here
    train, held_out = _splits(settings)
    writes: list[dict[str, Any]] = []
    place = {"train": 0, "eval": 0}
    for name in mapping(value):
        found: dict[str, Any] = {}
        for part, splits in (("train", train), ("eval", held_out)):
            for split in splits:
                where = f"data.{part}.{place[part]}"
                found |= {f"{where}.path": name, **({f"{where}.split": split} if split else {})}
                place[part] += 1
        writes.append(found)
    return [
        Row(name, share, Outcome("carried" if share == 1 else "changed", found, why))
        for (name, share), found in zip(mapping(value).items(), writes, strict=True)
        for why in ("" if share == 1 else "all of its rows: a slice of the split takes a part, such as train[:10%]",)
    ]


def _splits(settings: Settings) -> tuple[list[str], list[str]]:
    """Those that train, at least one that is not named, and those that are held out, where that is evaluated."""
    given = settings.get("dataset_splits")
    named = [] if is_off(given) else texts(given)
    train = [name for name in named if "train" in name]
    held_out = [name for name in named if "test" in name] if evaluates(settings) else []
    return train or [""], held_out


def _dataset_splits(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    if is_off(settings.get("dataset_mixer")):
        return Outcome("not supported", why="set data.train[].split, and data.eval")
    return Outcome("carried", why="in the sources of dataset_mixer: train in a name trains, test is held out")


DATA: dict[str, Rule] = {
    "dataset_name": carried("data.train.0.path", text),
    "dataset_config": carried("data.train.0.name", text),
    "dataset_train_split": _train_split,
    "dataset_test_split": _test_split,
    "dataset_splits": _dataset_splits,
    "dataset_streaming": carried("data.streaming", flag),
    "streaming": carried("data.streaming", flag),
    "test_split_size": _test_size,
}
"""Keys that name data."""

SECTIONS = {"datasets": _data, "dataset_mixture": _mixture, "dataset_mixer": _mixer}
"""Keys that hold several data sets."""
