"""kill -9 at any write and at any time: the run goes on and ends in the same bits, with nothing left over."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_cases import KINDS, check_same, run, screen, start, writes

EVERY = {kind: 3 if kind == "lora" else 9 for kind in KINDS}
MOST = 360  # more than a run writes; what is beyond its last write happens to a finished run


def killed_and_resumed(case: Any, output: Path, number: int) -> None:
    status = run(case.recipe, output, at=number, action="kill")
    assert status == (-signal.SIGKILL if number <= len(case.writes) else 0)
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)


@pytest.mark.parametrize(
    "words",
    [
        ("half of", ".saving-2/checkpoint-2/optimizer.pt"),
        ("os.rename", ".saving-2/checkpoint-2"),
        ("os.rename", "adapter_config.json"),
        ("os.remove", ".lock"),
    ],
    ids=["within the first save", "before it is in its place", "within the last save", "as it ends"],
)
def test_killed_within_a_save(case: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    killed_and_resumed(case, tmp_path / "output", case.first(*words))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("full", ("os.rename", "model.safetensors")),
        ("streamed", ("opened", ".saving-4", "stream-00000-of-00001.npz")),
        ("preference", ("half of", ".saving-4", "adapter_model.safetensors")),
    ],
)
def test_other_kinds_of_run_killed_within_a_save(cases: Any, tmp_path: Path, kind: str, words: tuple[str, ...]) -> None:
    killed_and_resumed(cases(kind), tmp_path / "output", cases(kind).first(*words))


def test_killed_after_it_went_on_from_an_earlier_checkpoint(case: Any, tmp_path: Path) -> None:
    """A later checkpoint of the run before is there still, with other weights, and at its end."""
    words = ("--set", "training.learning_rate=0.03", "--set", "training.save_steps=1")
    outputs = [tmp_path / name / "output" for name in ("whole", "killed")]
    for output in outputs:
        shutil.copytree(case.whole, output)
        earlier = ("--resume", str(output / "checkpoint-4"), *words)
        if output is outputs[0]:
            assert run(case.recipe, output, *earlier) == 0
        else:
            second = next(line for line in writes(outputs[0]) if "os.rmdir .saving-5" in line)
            assert run(case.recipe, output, *earlier, at=int(second.split()[0]), action="kill") == -signal.SIGKILL
            assert run(case.recipe, output, "--resume", *words) == 0
            assert f"going on from {output / 'checkpoint-5'}" in screen(output).replace("\n", "")
    check_same(outputs[1], outputs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_writes_are_those_of_a_run(cases: Any, kind: str) -> None:
    """What is counted covers every file that a run leaves."""
    case = cases(kind)
    assert len(case.writes) < MOST - EVERY[kind]
    written = {line.rpartition("/")[2].rpartition(" ")[2] for line in case.writes}
    left = {path.name for path in case.whole.rglob("*") if path.is_file()} - {"tokenizer.json"}  # by another language
    assert {name for name in left if name not in written and f".{name}.part" not in written} == set()


@pytest.mark.faults
def test_killed_while_it_takes_the_lock(case: Any, tmp_path: Path) -> None:
    killed_and_resumed(case, tmp_path / "output", case.first("opened", ".lock"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind in KINDS for number in range(1, MOST, EVERY[kind])]
)
def test_killed_at_many_writes(cases: Any, tmp_path: Path, kind: str, number: int) -> None:
    killed_and_resumed(cases(kind), tmp_path / "output", number)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random(case: Any, seconds: float, tmp_path: Path, seed: int) -> None:
    """Fourteen at any time, three within the first save and three within the last; each of them twice in a row."""
    draw, output = random.Random(seed), tmp_path / "output"
    arguments = ["train", str(case.recipe), "--set", f"training.output_dir={output}", "--resume", "auto"]
    for _ in range(2):
        if seed < 14:
            process = start(arguments, output)
            time.sleep(draw.uniform(0, seconds))
            process.kill()  # nothing, where the run has ended
            process.join()
        else:
            first = seed < 17
            begin = case.first("os.mkdir .saving-2") if first else case.first("checkpoint-2") + 1
            begin = begin if first else case.first("fsync .saving-6/checkpoint-6/manifest.json") + 3
            end = case.first("fsync .saving-2/checkpoint-2/manifest.json") + 5 if first else len(case.writes)
            run(case.recipe, output, "--resume", "auto", at=draw.randint(begin, end), action="kill")
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)
