"""Trackers of transformers' own get the figures of a run, without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.cli import main
from forked import FORKED

FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "trained_tokens_per_second", "fill")


def tracked(folder: Path, recipe: Path, settings: list[str], asked: tuple[str, ...]) -> None:
    """A run and then a question to trackio, in a process that has imported neither tracker."""
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    torch.set_num_threads(1)
    if main(["train", str(recipe), *settings]):
        sys.exit(1)
    from trackio.cli import main as trackio

    sys.argv = ["trackio", *asked]
    with (folder / "answer").open("w") as file, contextlib.redirect_stdout(file):
        trackio()


def test_two_trackers_have_what_the_record_has(write_recipe: Any, tmp_path: Path) -> None:
    """In a process of its own: trackers read the environment when they are imported."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio")
    given = ("max_steps=3", "logging_steps=1", "report_to=[tensorboard, trackio]", "project=p", "run_name=first")
    settings = [argument for setting in given for argument in ("--set", f"training.{setting}")]
    asked = ("get", "metric", "--project", "p", "--run", "first", "--metric", "train/loss", "--json")
    process = FORKED.Process(target=tracked, args=(tmp_path, write_recipe(), settings, asked))
    process.start()
    process.join()
    assert process.exitcode == 0
    lines = (tmp_path / "output" / "run.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]

    (file,) = (tmp_path / "output" / "runs").rglob("events.*")
    read = events.EventAccumulator(str(file)).Reload()
    for name in FIGURES:
        found = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries], name

    values = json.loads((tmp_path / "answer").read_text())["values"]
    assert [value["value"] for value in values] == [pytest.approx(entry["loss"]) for entry in entries]
