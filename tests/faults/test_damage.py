"""Files of a checkpoint that are cut short or gone: the one before is taken, and the run ends in the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fault_cases import check_same, run, screen

FILES = [
    *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json"),
    *("optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"),
    "training_args.bin",
]


@pytest.fixture(scope="module")
def stopped(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run was killed after its second checkpoint."""
    output = tmp_path_factory.mktemp("stopped") / "output"
    number = case.first("os.rmdir .saving-4")
    assert run(case.recipe, output, at=number, action="kill") == -signal.SIGKILL
    return output


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"!" + content[1:]}[how])


def resumed(case: Any, stopped: Path, output: Path, name: str, how: str) -> str:
    shutil.copytree(stopped, output)
    damage(output / name, how)
    if how != "gone":
        os.utime(output / name, (1, 1))  # long ago: a lock that is empty just now may be one that is being written
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)
    return screen(output)


def test_the_files_are_those_of_a_checkpoint(case: Any) -> None:
    assert sorted(path.name for path in (case.whole / "checkpoint-6").iterdir()) == FILES


def test_a_checkpoint_without_its_optimizer_is_passed_over(case: Any, stopped: Path, tmp_path: Path) -> None:
    said = resumed(case, stopped, tmp_path / "output", "checkpoint-4/optimizer.pt", "gone")
    assert "checkpoint-4 is passed over: optimizer.pt is missing" in said
    assert f"going on from {tmp_path / 'output' / 'checkpoint-2'}" in said.replace("\n", "")


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "other"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(case: Any, stopped: Path, tmp_path: Path, name: str, how: str) -> None:
    assert "checkpoint-4 is passed over: " in resumed(case, stopped, tmp_path / "output", f"checkpoint-4/{name}", how)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["config.yaml", "report.json", "run.json", "run.jsonl", "train.log", ".lock"])
def test_a_damaged_record(case: Any, stopped: Path, tmp_path: Path, name: str, how: str) -> None:
    assert "passed over" not in resumed(case, stopped, tmp_path / "output", name, how)
