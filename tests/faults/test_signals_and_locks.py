"""SIGTERM and Ctrl-C at any write, and two runs in one folder."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_cases import check_same, run, screen, start

MOMENTS = range(1, 281, 14)


def signalled_and_resumed(case: Any, output: Path, number: int, action: Any) -> int:
    status = run(case.recipe, output, at=number, action=action)
    assert status in (0, 143 if action == "term" else 130)
    record = output / "run.json"
    recorded = json.loads(record.read_text())["status"] if record.exists() else "nothing"
    if status:
        assert recorded != "finished"
        assert not (output / "metrics.json").exists() or number > case.first("opened .metrics.json.part")
    if status:
        assert screen(output).count(f"SIG{action.upper()}: ") == 1 + ("the run ends" in screen(output))
        assert "Traceback" not in screen(output)
        assert not (output / ".lock").exists()
    if status in (130, 143) and "stopped after step" in screen(output):
        assert "with a checkpoint; go on with --resume" in screen(output)
        assert not (output / "adapter_config.json").exists()
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)
    return status


def test_a_signal_within_the_first_save(case: Any, tmp_path: Path) -> None:
    number = case.first("half of", ".saving-2/checkpoint-2/optimizer.pt")
    assert signalled_and_resumed(case, tmp_path / "output", number, "term") == 143


@pytest.mark.faults
@pytest.mark.parametrize("action", ["term", "int"])
@pytest.mark.parametrize("number", MOMENTS)
def test_a_signal_at_twenty_moments(case: Any, tmp_path: Path, number: int, action: str) -> None:
    signalled_and_resumed(case, tmp_path / "output", number, action)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.faults
@pytest.mark.parametrize(
    "words", [("open", ".config.yaml.part"), ("half of", ".saving-4"), ("os.rename", "adapter_config.json")]
)
def test_a_second_run_leaves_the_first_alone(case: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    output = tmp_path / "first" / "output"
    arguments = ["train", str(case.recipe), "--set", f"training.output_dir={output}"]
    first = start(arguments, output, case.first(*words), "pause")
    try:
        while not is_stopped(first.pid):
            time.sleep(0.05)
        before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
        for more in ([], ["--resume", "auto"]):
            second = start([*arguments, *more], output)
            second.join(300)
            assert second.exitcode == 2
            assert "is in use by " in screen(output)
        assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(300)
    assert first.exitcode == 0
    check_same(output, case.whole)


@pytest.mark.faults
@pytest.mark.parametrize("attempt", range(3))
def test_of_two_runs_that_start_together_one_goes_on(case: Any, tmp_path: Path, attempt: int) -> None:
    output = tmp_path / "output"
    arguments = ["train", str(case.recipe), "--set", f"training.output_dir={output}"]
    both = [start(arguments, output), start(arguments, output)]
    for process in both:
        process.join(300)
    assert sorted(process.exitcode for process in both) == [0, 2]
    check_same(output, case.whole)
