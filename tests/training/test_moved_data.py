"""A run goes on with rows that have moved, and asks for a word where they are others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import IterableDataset
from rich.console import Console
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_conversations

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.training.packs import load_data
from deltatune.training.run import train
from deltatune.training.sealed import seal
from deltatune.training.since import changed_data, changed_settings, evaluates_otherwise

COMPARES = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 3}
COMPARES |= {"load_best_model_at_end": True, "save_strategy": "steps"}


def recipe(folder: Path, *train: Any, **sections: Any) -> Recipe:
    """Sources by path, or as they are written."""
    written = [source if isinstance(source, dict) else {"path": str(source)} for source in train]
    data = {"train": written, **sections.pop("data", {})}
    return make_recipe(folder, folder / "base", data=data, **sections)


def saved(folder: Path, before: Recipe) -> Path:
    """What a checkpoint keeps of a recipe and its data."""
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    digests = load_data(before, byte_tokenizer()).digests(before.data)
    seal(checkpoint, {"recipe": before.model_dump(mode="json"), "data": digests})
    return checkpoint


def verdicts(checkpoint: Path, now: Recipe) -> dict[str, str]:
    found = changed_settings(now, checkpoint, allow=True)
    found += changed_data(now, load_data(now, byte_tokenizer()), checkpoint, allow=True)
    return {change.key: change.verdict for change in found}


def renamed(rows: Path) -> Path:
    return rows.rename(rows.parent / "other name.jsonl")


def in_a_folder(rows: Path) -> Path:
    (rows.parent / "rows").mkdir()
    rows.rename(rows.parent / "rows" / "train.jsonl")
    return rows.parent / "rows"


def by_a_pattern(rows: Path) -> Path:
    return rows.parent / "row*.jsonl"


def compressed(rows: Path) -> Path:
    (rows.parent / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    rows.unlink()
    return rows.parent / "rows.jsonl.gz"


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("move", [renamed, in_a_folder, by_a_pattern, compressed])
def test_equal_rows_elsewhere_are_the_same_data(tmp_path: Path, move: Callable[[Path], Path], streaming: bool) -> None:
    kept = write_conversations(tmp_path / "kept.jsonl", 9)
    rows = write_conversations(tmp_path / "rows.jsonl", 20, first=9)
    checkpoint = saved(tmp_path, recipe(tmp_path, kept, rows, data={"streaming": streaming}))
    now = recipe(tmp_path, kept, move(rows), data={"streaming": streaming})
    assert verdicts(checkpoint, now) == {"data.train.1.path": "moved"}
    changes = changed_settings(now, checkpoint, allow=False)
    assert [str(change).startswith("data.train.1.path: ") for change in changes] == [True]
    assert not evaluates_otherwise(changes)


def test_shards_under_other_names_are_the_same_data_in_the_same_order(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("before", "moved", "turned")]
    for folder, names in zip(folders, (("a", "b"), ("part-0", "part-1"), ("b", "a")), strict=True):
        folder.mkdir()
        for number, name in enumerate(names):
            write_conversations(folder / f"{name}.jsonl", 9, first=9 * number)
    checkpoint = saved(tmp_path, recipe(tmp_path, folders[0]))
    assert verdicts(checkpoint, recipe(tmp_path, folders[1])) == {"data.train.0.path": "moved"}
    assert verdicts(checkpoint, recipe(tmp_path, folders[2])) == {"data.train.0.path": "asks"}


def test_other_rows_elsewhere_need_a_word(tmp_path: Path) -> None:
    rows, other = (write_conversations(tmp_path / f"{count}.jsonl", count) for count in (20, 19))
    checkpoint = saved(tmp_path, recipe(tmp_path, rows, other))
    for now in (recipe(tmp_path, rows, rows), recipe(tmp_path, other, rows), recipe(tmp_path, rows, other, other)):
        assert set(verdicts(checkpoint, now).values()) == {"asks"}
        with pytest.raises(UserError, match=r"data\.train.* --allow-change"):
            changed_settings(now, checkpoint, allow=False)


def test_files_that_took_the_name_of_each_other_are_the_same_data(tmp_path: Path) -> None:
    rows, other = (write_conversations(tmp_path / f"{count}.jsonl", count) for count in (20, 19))
    checkpoint = saved(tmp_path, recipe(tmp_path, rows, other))
    rows.rename(tmp_path / "between")
    other.rename(rows)
    (tmp_path / "between").rename(other)
    assert verdicts(checkpoint, recipe(tmp_path, other, rows)) == {
        "data.train.0.path": "moved",
        "data.train.1.path": "moved",
    }
    assert set(verdicts(checkpoint, recipe(tmp_path, rows, other)).values()) == {"asks"}, "rows of both"


def test_what_else_is_said_of_a_moved_source_has_its_verdict(tmp_path: Path) -> None:
    rows = write_conversations(tmp_path / "rows.jsonl", 20)
    checkpoint = saved(tmp_path, recipe(tmp_path, {"path": str(rows), "weight": 1.0}))
    now = recipe(tmp_path, {"path": str(renamed(rows)), "weight": 2.0})
    assert verdicts(checkpoint, now) == {"data.train.0.path": "moved", "data.train.0.weight": "asks"}


def test_held_out_rows_elsewhere_are_those_that_evaluations_were_of(tmp_path: Path) -> None:
    rows, held_out = (write_conversations(tmp_path / f"{name}.jsonl", 20) for name in ("rows", "eval"))
    other = write_conversations(tmp_path / "other.jsonl", 19)

    def evaluated_on(path: Path) -> Recipe:
        return recipe(tmp_path, rows, data={"eval": [{"path": str(path)}]}, training=COMPARES)

    checkpoint = saved(tmp_path, evaluated_on(held_out))
    assert verdicts(checkpoint, evaluated_on(renamed(held_out))) == {"data.eval.0.path": "moved"}
    with pytest.raises(UserError, match=r"data\.eval\.0\.path: .* cannot act"):
        changed_settings(evaluated_on(other), checkpoint, allow=True)


def test_a_revision_of_the_same_commit_is_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "1", "main": "1", "v2": "2"}
    rows = IterableDataset.from_generator(lambda: ({"text": f"row {number}"} for number in range(9)))

    def builder(path: str, name: str | None, *, revision: str | None) -> Any:
        return SimpleNamespace(hash=commits[revision], as_streaming_dataset=lambda split: rows)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)

    def streamed(**source: Any) -> Recipe:
        return recipe(tmp_path, {"path": "owner/data", **source}, data={"streaming": True})

    checkpoint = saved(tmp_path, streamed())
    assert verdicts(checkpoint, streamed(revision="main")) == {"data.train.0.revision": "moved"}
    assert set(verdicts(checkpoint, streamed(revision="v2")).values()) == {"asks"}
    assert verdicts(checkpoint, streamed(split="test")) == {"data.train.0.split": "asks"}, "of the same commit"


def test_a_run_goes_on_with_rows_that_have_moved(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_checkpoint(tmp_path / "base")
    rows = write_conversations(tmp_path / "rows.jsonl", 24)

    def run(path: Path, output: str, steps: int) -> Recipe:
        training = {"output_dir": str(tmp_path / output), "max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        few = {"target_modules": ["q_proj"]}
        off = {"enabled": False, "lengths": None}
        data = {"train": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache")}
        schedule = {"lr_scheduler_type": "constant"}
        return make_recipe(tmp_path, base, data=data, lora=few, verify=off, training={**training, **schedule})

    quiet = Console(quiet=True)
    whole = train(run(rows, "whole", 4), console=quiet)
    train(run(rows, "moved", 2), console=quiet)
    moved = renamed(rows)
    with pytest.raises(UserError, match=r"rows\.jsonl does not exist.*goes on with --resume where the key"):
        train(run(rows, "moved", 4), resume=True, console=quiet)
    result = train(run(moved, "moved", 4), resume=True, console=quiet)
    assert result.metrics["leg"]["steps"] == 2
    assert result.metrics["loss"] == whole.metrics["loss"]
    leg = json.loads((tmp_path / "moved" / "run.json").read_text())["legs"][-1]
    assert f'data.train.0.path: "{rows}" -> "{moved}"' in leg["changes"]
    assert list(leg["data"]) == [str(moved)]
