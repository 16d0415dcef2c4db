"""A disk that is full: one line, and with room again the run goes on to the same bits."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_cases import KINDS, check_same, run, screen

EVERY = {kind: 7 if kind == "lora" else 21 for kind in KINDS}
MOST = 360
MOMENTS = [(kind, number) for kind in KINDS for number in range(2, MOST, EVERY[kind])]


def filled_and_resumed(case: Any, output: Path, number: int) -> None:
    status = run(case.recipe, output, at=number, action="full")
    said = screen(output)
    assert "Traceback" not in said
    if status:
        assert status == 2
        assert said.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in said.splitlines()[-1]
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "lora" else pytest.mark.faults) for kind in KINDS]
)
def test_a_full_disk_within_a_save(cases: Any, tmp_path: Path, kind: str) -> None:
    case = cases(kind)
    filled_and_resumed(case, tmp_path / "output", case.first("before", ".saving-4", "optimizer.pt"))
    assert "checkpoint" in screen(tmp_path / "output")


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "number"), MOMENTS)
def test_a_full_disk_at_many_writes(cases: Any, tmp_path: Path, kind: str, number: int) -> None:
    filled_and_resumed(cases(kind), tmp_path / "output", number)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """A file system of its own, and a function that gives it a size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("kilobytes", [48, 80, 120, 160, 180, 196, 200, 240])
def test_a_disk_that_is_really_full(case: Any, tmp_path: Path, small_disk: Any, kilobytes: int) -> None:
    small_disk(f"{kilobytes}k")
    output = tmp_path / "disk" / "output"
    status = run(case.recipe, output)
    small_disk("100m")
    assert status == 2
    said = (tmp_path / "disk" / "screen.txt").read_text()
    assert "Traceback" not in said
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)
