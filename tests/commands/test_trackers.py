"""Trackers of transformers' own get the figures of a run, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "trained_tokens_per_second", "fill")


def test_two_trackers_have_what_the_record_has(write_recipe: Any, tmp_path: Path) -> None:
    """In processes of their own: trackers read the environment when they are imported."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    pytest.importorskip("trackio", reason="needs trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}

    def said_by(*command: str) -> str:
        given = [sys.executable, *command]
        return subprocess.run(given, env=environment, check=True, capture_output=True, text=True).stdout

    given = ("max_steps=3", "logging_steps=1", "report_to=[tensorboard, trackio]", "project=p", "run_name=first")
    settings = [argument for setting in given for argument in ("--set", f"training.{setting}")]
    said_by("-m", "deltatune", "train", str(write_recipe()), *settings)
    lines = (tmp_path / "output" / "run.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]

    (file,) = (tmp_path / "output" / "runs").rglob("events.*")
    read = events.EventAccumulator(str(file)).Reload()
    for name in FIGURES:
        found = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries], name

    asked = ("get", "metric", "--project", "p", "--run", "first", "--metric", "train/loss", "--json")
    values = json.loads(said_by("-c", "from trackio.cli import main; main()", *asked))["values"]
    assert [value["value"] for value in values] == [pytest.approx(entry["loss"]) for entry in entries]
