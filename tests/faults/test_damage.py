"""Files of a checkpoint that are cut short or gone: the one before is taken, and the run ends in the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fault_cases import KINDS, check_same, run, screen

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
ALL = {
    *("chat_template.jinja", "manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt"),
    *("tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin"),
}
FILES = {
    "lora": ALL | ADAPTER,
    "full": ALL | {"config.json", "generation_config.json", "model.safetensors"},
    "streamed": ALL | ADAPTER | {"stream-00000-of-00001.npz"},
    "preference": ALL | ADAPTER,
}


@pytest.fixture(scope="module")
def stopped(cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a kind of run that was killed after its second checkpoint."""

    @cache
    def killed(kind: str) -> Path:
        output, case = tmp_path_factory.mktemp(kind) / "output", cases(kind)
        assert run(case.recipe, output, at=case.first("os.rmdir .saving-4"), action="kill") == -signal.SIGKILL
        return output

    return killed


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"!" + content[1:]}[how])


def resumed(case: Any, stopped: Path, output: Path, name: str, how: str) -> str:
    """What the run says that goes on from a folder in which a file is damaged, and ends in the same bits."""
    shutil.copytree(stopped, output)
    damage(output / name, how)
    if how != "gone":
        os.utime(output / name, (1, 1))  # long ago: a lock that is empty just now may be one that is being written
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)
    return screen(output)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_a_checkpoint(cases: Any, kind: str) -> None:
    assert {path.name for path in (cases(kind).whole / "checkpoint-6").iterdir()} == FILES[kind]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("lora", "optimizer.pt"),
        ("full", "model.safetensors"),
        ("streamed", "stream-00000-of-00001.npz"),
        ("preference", "adapter_model.safetensors"),
    ],
)
def test_a_checkpoint_without_a_file_is_passed_over(
    cases: Any, stopped: Any, tmp_path: Path, kind: str, name: str
) -> None:
    said = resumed(cases(kind), stopped(kind), tmp_path / "output", f"checkpoint-4/{name}", "gone")
    assert f"checkpoint-4 is passed over: {name} is missing" in said.replace("\n", " ")
    assert f"going on from {tmp_path / 'output' / 'checkpoint-2'}" in said.replace("\n", "")


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "other"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(FILES[kind])])
def test_a_damaged_file(cases: Any, stopped: Any, tmp_path: Path, kind: str, name: str, how: str) -> None:
    said = resumed(cases(kind), stopped(kind), tmp_path / "output", f"checkpoint-4/{name}", how)
    assert "checkpoint-4 is passed over: " in said


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["config.yaml", "report.json", "run.json", "run.jsonl", "train.log", ".lock"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_record(cases: Any, stopped: Any, tmp_path: Path, kind: str, name: str, how: str) -> None:
    assert "passed over" not in resumed(cases(kind), stopped(kind), tmp_path / "output", name, how)
