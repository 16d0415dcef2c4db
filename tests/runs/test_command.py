"""The command that a record holds can be typed again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from deltatune.runs.command import STARTED_BY, command_line, resuming_command


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/venv/bin/deltatune", "train", "my recipe.yaml"], "deltatune train 'my recipe.yaml'"),
        (["/src/deltatune/__main__.py", "train", "mine.yaml"], "python -m deltatune train mine.yaml"),
        (["scripts/mine.py", "--steps", "3"], "scripts/mine.py --steps 3"),
    ],
)
def test_what_was_typed(monkeypatch: Any, argv: list[str], expected: str) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv(STARTED_BY, raising=False)
    assert command_line() == expected
    monkeypatch.setenv(STARTED_BY, "deltatune train mine.yaml --nproc 2")
    assert command_line() == "deltatune train mine.yaml --nproc 2"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("deltatune train 'my recipe.yaml' --nproc 2", "deltatune train 'my recipe.yaml' --nproc 2 --resume"),
        ("deltatune train a.yaml --resume auto --set x=1", "deltatune train a.yaml --set x=1 --resume"),
        ("deltatune train a.yaml --resume=out/checkpoint-2", "deltatune train a.yaml --resume"),
        ("deltatune train a.yaml --resume --allow-change", "deltatune train a.yaml --allow-change --resume"),
        ("python -m deltatune train a.yaml", "python -m deltatune train a.yaml --resume"),
        ("scripts/train.py train", "--resume"),
        ("deltatune", "--resume"),
    ],
)
def test_how_a_run_goes_on(monkeypatch: Any, typed: str, expected: str) -> None:
    monkeypatch.setenv(STARTED_BY, typed)
    assert resuming_command() == expected
    assert resuming_command(Path("/my runs/checkpoint-2")) == f"{expected} '/my runs/checkpoint-2'"


def test_a_launcher_that_does_not_tell_its_command_has_none_to_type_again(monkeypatch: Any) -> None:
    """Arguments of a rank of torchrun would start one process."""
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/deltatune", "train", "mine.yaml"])
    monkeypatch.delenv(STARTED_BY, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert resuming_command() == "deltatune train mine.yaml --resume"
    monkeypatch.setenv("RANK", "0")
    assert resuming_command() == "--resume"
    monkeypatch.setenv(STARTED_BY, "deltatune train mine.yaml --nproc 2")
    assert resuming_command() == "deltatune train mine.yaml --nproc 2 --resume"
