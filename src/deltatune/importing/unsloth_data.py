"""The data of a script: the arguments of load_dataset, and what a trainer is told of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deltatune.importing.paths import is_data_file, path_of
from deltatune.importing.rules import Outcome, Rule, Settings, alone, carried, refused
from deltatune.importing.values import NotLiteral, is_off, text, texts

__all__ = ["LOADED_DATA"]


def _dataset(value: Any, settings: Settings) -> Outcome:
    if not is_off(settings.get("path")):
        why = f"{value}: the data of load_dataset; what the script does to its rows is not carried"
        return Outcome("changed", why=why)
    return Outcome("not supported", why=f"{value} is made by the script: name a file in data.train.0.path")


@alone
def _files(value: Any) -> Outcome:
    if isinstance(value, dict) and len(value) > 1 and "train" in value:
        return _split_files(value)
    files = texts(list(value.values())[:1] if isinstance(value, dict) else value)
    if len(files) == 1:
        return Outcome("carried", {"data.train.0.path": files[0]})
    return Outcome(
        "not supported", {"data.train.0.path": files[0]}, "the first alone; give a pattern, or a source each"
    )


def _split_files(value: dict[str, Any]) -> Outcome:
    """Files by split: those to train on and those to evaluate on."""
    held_out = next((name for name in ("validation", "valid", "eval", "dev", "test") if name in value), None)
    named = {"data.train.0.path": value["train"], "data.eval.0.path": value.get(held_out or "")}
    files = {key: texts(given) for key, given in named.items() if given}
    left = [name for name in value if name not in ("train", held_out)]
    lost = [*left, *(key for key, given in files.items() if len(given) > 1)]
    why = f"without {', '.join(lost)}: the first file alone; give a pattern, or a source each" if lost else ""
    return Outcome("not supported" if lost else "carried", {key: given[0] for key, given in files.items()}, why)


def _split(value: Any, settings: Settings) -> Outcome:
    if value == "train" and (not is_off(settings.get("data_files")) or is_data_file(settings.get("path"))):
        return Outcome("no effect here", why="a file is one split, train")
    return Outcome("carried", {"data.train.0.split": text(value)})


def _text_field(value: Any, settings: Settings) -> Outcome:
    if "train_on_responses_only" in settings:
        return Outcome("changed", {"data.train_on": "assistant"}, "conversations go through the chat template here")
    if isinstance(settings.get("formatting_func"), NotLiteral) or not is_off(settings.get("chat_template")):
        return Outcome("changed", {"data.train_on": "all"}, "all of a conversation trains, by the chat template")
    return Outcome("no effect here", why=f"{value}: the default here, where rows have no messages")


LOADED_DATA: Final[Mapping[str, Rule]] = {
    "train_dataset": _dataset,
    "dataset_text_field": _text_field,
    "path": path_of("data.train.0"),
    "name": carried("data.train.0.name", text),
    "split": _split,
    "data_files": _files,
    "data_dir": refused("name the folder as the path"),
}
