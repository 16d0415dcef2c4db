"""What run.json says of legs that end in any way, and of the checkout that ran them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltatune.training import provenance
from deltatune.training.batches import PackCounts
from deltatune.training.metrics import MeterReading
from deltatune.training.record import RunRecord

METER: Any = SimpleNamespace(logged=MeterReading(PackCounts(trained=3, tokens=5, packs=1), 1.23456, 1))


def leg_of(folder: Path, *, from_step: int = 0) -> RunRecord:
    return RunRecord(folder, {"device": "cpu"}, model={"class": "M"}, changes=[], from_step=from_step, meter=METER)


def log(record: RunRecord, step: int, **logs: Any) -> None:
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
    record.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]


def legs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["legs"]
    return found


def test_a_killed_leg_says_how_far_it_came_and_the_next_one_that_it_was_killed(tmp_path: Path) -> None:
    first = leg_of(tmp_path)
    log(first, 1, loss=3.0)
    log(first, 2, eval_loss=2.5)
    log(first, 4, loss=2.0)
    (leg,) = legs(tmp_path)
    assert (leg["status"], leg["to_step"], leg["first_loss"], leg["last_loss"], leg["eval_loss"]) == (
        "running", 4, 3.0, 2.0, 2.5
    )  # fmt: skip
    assert (leg["tokens"], leg["trained_tokens"], leg["packs"], leg["seconds"]) == (5, 3, 1, 1.235)
    second = leg_of(tmp_path, from_step=2)
    assert [leg["status"] for leg in legs(tmp_path)] == ["killed", "running"]
    second.end("finished", 6)
    assert [leg["status"] for leg in legs(tmp_path)] == ["killed", "finished"]
    assert json.loads((tmp_path / "run.json").read_text())["model"] == {"class": "M"}


def test_a_checkpoint_is_noted_when_it_is_saved(tmp_path: Path) -> None:
    """A leg that logs seldom, and is killed, came this far."""
    state: Any = SimpleNamespace(global_step=7)
    leg_of(tmp_path).on_save(None, state, None)  # type: ignore[arg-type]
    assert legs(tmp_path)[0]["to_step"] == 7


@pytest.mark.parametrize("content", ["[]", '{"legs": 3}', '{"legs": [1, "x"]}', "[" * 100_000])
def test_a_record_that_says_something_else_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    leg_of(tmp_path)
    assert [leg["status"] for leg in legs(tmp_path)] == ["running"]


def test_half_a_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    """As a full disk leaves it."""
    whole = '{"leg": 1, "step": 1}\n'
    (tmp_path / "run.jsonl").write_text(whole + '{"leg": 1, "st')
    log(leg_of(tmp_path, from_step=1), 2, loss=3.0)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("tracked", [True, False], ids=["a checkout", "installed inside another project's checkout"])
def test_the_commit_is_that_of_the_package_and_not_of_what_lies_around_it(
    tmp_path: Path, tracked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lib" / "deltatune"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "other.txt").write_text("")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "." if tracked else "other.txt"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    named = SimpleNamespace(__file__=str(package / "__init__.py"), __version__="1.2")
    monkeypatch.setattr(provenance, "deltatune", named)
    leg_of(tmp_path)
    commit = legs(tmp_path)[0]["deltatune"]["git"]
    assert (commit is not None and len(commit) == 40) == tracked
