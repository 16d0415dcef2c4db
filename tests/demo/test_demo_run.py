"""The whole demo in a few eager steps: files, answers, table, verdict."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pytest
from rich.console import Console

from deltatune.config.load import load_recipe
from deltatune.config.schema import Recipe
from deltatune.demo import __main__ as demo

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    return [
        f"model.name_or_path={tmp_path}/checkpoint",
        f"data.train.0.path={tmp_path}/train.jsonl",
        f"data.cache_dir={tmp_path}/cache",
        f"training.output_dir={tmp_path}/trained",
        "training.max_steps=2",
        "verify.lengths=[5,1,9]",
        "compile=false",
    ]


@pytest.fixture
def recipe(overrides) -> Recipe:
    return load_recipe(RECIPE, overrides).recipe


def test_the_recipe_is_packed_compiled_and_trains_every_weight() -> None:
    loaded = load_recipe(RECIPE)
    assert loaded.warnings == []
    assert loaded.recipe.compile is not None
    assert loaded.recipe.lora is None
    assert loaded.recipe.verify.enabled


def test_it_runs_from_beginning_to_end(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "verify", functools.partial(demo.verify, lengths=recipe.verify.lengths))
    monkeypatch.setattr(demo, "NUM_TIMED", 1)
    monkeypatch.setattr(demo, "NUM_WARM_UP", 1)
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 6)
    out = io.StringIO()
    answers = demo.run(recipe, Console(file=out, width=120), num_train=60)
    text = out.getvalue()
    assert len(answers) == 6
    assert (tmp_path / "trained" / "model.safetensors").is_file()
    assert "OK: every document is as independent as if it were alone" in text
    assert "padded, eager (stock)" in text
    assert "reference code on a CPU" in text
    assert "\x1b" not in text


def test_prepare_only_makes_what_the_recipe_reads(overrides, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "NUM_HELD_OUT", 6)
    arguments = [part for override in overrides for part in ("--set", override)]
    assert demo.main(["--recipe", str(RECIPE), "--prepare-only", *arguments]) == 0
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    assert (tmp_path / "train.jsonl").is_file()
    assert (tmp_path / "held_out.jsonl").is_file()
    assert not (tmp_path / "trained").exists()


def test_a_missing_recipe_is_one_line(capsys) -> None:
    assert demo.main(["--recipe", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: no such recipe\n"
