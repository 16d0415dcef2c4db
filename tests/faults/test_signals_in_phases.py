"""SIGTERM and Ctrl-C outside of training steps: one line names the phase, what is kept and the command to go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fault_cases import Action, At, check_same, child, ended, run, screen, start
from training_cases import write_conversations

from forked import FORKED, free_port

STATUS = {"term": 143, "int": 130}
NOTHING = "this command has trained nothing"
PROBED = ("--set", "verify.enabled=true")
EVALUATED = ("--set", "data.val_size=4", "--set", 'samples.prompts=["Say it"]')


def said(output: Path, action: Action) -> str:
    """The one line that an interrupted command ends with; there is nothing else of the signal on the screen."""
    text = screen(output)
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if f"SIG{action.upper()}" in line]
    assert lines == text.splitlines()[-1:]
    return lines[0].removeprefix(f"SIG{action.upper()}: ")


def left(output: Path) -> list[str]:
    """Files that are not whole, or look like a finished run's."""
    names = [path.name for path in output.rglob("*")]
    own = [name for name in names if name.endswith(".part") or name.startswith((".saving", ".lock"))]
    return own + [name for name in ("adapter_config.json", "metrics.json") if (output / name).exists()]


def interrupted(case: Any, output: Path, at: str, action: Action, *words: str) -> str:
    assert run(case.recipe, output, *words, at=at, action=action) == STATUS[action]
    assert left(output) == []
    record = output / "run.json"
    assert not record.exists() or json.loads(record.read_text())["status"] == "interrupted"
    return said(output, action)


def before_training(case: Any, output: Path, at: str, action: Action) -> None:
    words = ("--set", f"data.cache_dir={output.parent / 'cache'}", *PROBED)
    line = interrupted(case, output, at, action, *words)
    assert line.startswith(f"interrupted while {at}")
    assert f": {NOTHING}; start it again with " in line
    assert not (output / "run.json").exists()
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)


def test_a_signal_while_tokenising(case: Any, tmp_path: Path) -> None:
    before_training(case, tmp_path / "output", "tokenising", "term")


@pytest.mark.faults
@pytest.mark.parametrize("action", ["term", "int"])
@pytest.mark.parametrize(
    "at",
    [
        "importing the libraries",
        "loading the tokenizer",
        "describing the model",
        "reading",
        "tokenising",
        "packing",
        "loading the model",
        "adapting the model",
        "preparing the model",
        "probing the model",
        "computing the digest",
    ],
)
def test_a_signal_before_training(case: Any, tmp_path: Path, at: str, action: Action) -> None:
    before_training(case, tmp_path / "output", at, action)


@pytest.mark.parametrize("action", ["term", pytest.param("int", marks=pytest.mark.faults)])
def test_processes_that_tokenise_end_without_a_word(case: Any, tmp_path: Path, action: Action) -> None:
    rows = write_conversations(tmp_path / "many.jsonl", 1200)
    words = [f"data.train.0.path={rows}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_proc=2"]
    process = start(["preprocess", str(case.recipe), *with_set(words)], tmp_path / "output", "tokenising", action)
    process.join(60)
    assert process.exitcode == STATUS[action]
    assert ": what is tokenised is kept; " in said(tmp_path / "output", action)
    assert goes(process.pid), "some of its processes go on"
    assert ended(["preprocess", str(case.recipe), *with_set(words)], tmp_path / "output") == 0
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def goes(group: int) -> bool:
    """Whether the last process of a group ends within seconds; init takes its time to reap those without a parent."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.faults
@pytest.mark.parametrize("action", ["term", "int"])
def test_processes_that_load_data_end_without_a_word(case: Any, tmp_path: Path, action: Action) -> None:
    """The signal to all of the group leaves them to the step that waits for them."""
    output = tmp_path / "output"
    words = with_set(["training.dataloader_num_workers=2", "training.dataloader_prefetch_factor=1"])
    status = run(case.recipe, output, *words, at="saving checkpoint-2", action=action)
    assert status == STATUS[action]
    assert "Traceback" not in screen(output)
    assert screen(output).splitlines()[-1].startswith(f"SIG{action.upper()}: stopped after step 3 of 6")
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert left(output) == []
    assert run(case.recipe, output, "--resume", "auto") == 0
    check_same(output, case.whole)


def with_set(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def stopped_with_checkpoint_4(case: Any, output: Path) -> None:
    shutil.copytree(case.whole, output)
    shutil.rmtree(output / "checkpoint-6")
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json", "run.json"):
        (output / name).unlink()


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        ("restoring checkpoint-4", "the last whole checkpoint is {}; go on with "),
        pytest.param("checking checkpoint-4", f"{NOTHING}; start it again with ", marks=pytest.mark.faults),
        pytest.param("probing", f"{NOTHING}, and {{}} is whole; start it again with ", marks=pytest.mark.faults),
        pytest.param(
            "restoring the optimizer", "the last whole checkpoint is {}; go on with ", marks=pytest.mark.faults
        ),
    ],
)
def test_a_signal_before_a_run_goes_on(case: Any, tmp_path: Path, at: str, kept: str) -> None:
    output = tmp_path / "output"
    stopped_with_checkpoint_4(case, output)
    line = interrupted(case, output, at, "term", "--resume", *PROBED)
    assert f" while {at}" in line
    assert kept.format(output / "checkpoint-4") in line
    assert run(case.recipe, output, "--resume") == 0
    check_same(output, case.whole)


def test_the_first_signal_lets_the_last_save_end(case: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert run(case.recipe, output, at="saving the model", action="term") == 0
    assert "SIGTERM: the model is being saved, which ends the run; once more ends it at once" in screen(output)
    check_same(output, case.whole)


@pytest.mark.faults
@pytest.mark.parametrize("at", ["evaluating", "generating samples"])
def test_a_signal_in_the_last_evaluation(case: Any, tmp_path: Path, at: str) -> None:
    output = tmp_path / "output"
    line = interrupted(case, output, at, "int", *EVALUATED)
    place = output / "checkpoint-6"
    assert line.startswith(f"interrupted after step 6 while {at}: the last whole checkpoint is {place}; go on with ")
    assert run(case.recipe, output, *EVALUATED, "--resume") == 0
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("command", "at"),
    [
        (["merge", "ADAPTER", "--output", "OUTPUT"], "loading the model"),
        (["merge", "ADAPTER", "--output", "OUTPUT"], "computing with the adapter"),
        (["merge", "ADAPTER", "--output", "OUTPUT"], "merging"),
        (["merge", "ADAPTER", "--output", "OUTPUT"], "writing the model"),
        (["merge", "ADAPTER", "--output", "OUTPUT"], "comparing the merged model"),
        (["merge", "ADAPTER", "--output", "OUTPUT"], "writing OUTPUT to the disk"),
        (["export", "ADAPTER", "--layout", "peft", "--output", "OUTPUT"], "reading the adapter"),
        (["export", "ADAPTER", "--layout", "peft", "--output", "OUTPUT"], "writing the adapter"),
        (["plan", "RECIPE"], "packing"),
        (["preprocess", "RECIPE", "--set", "data.cache_dir=OUTPUT"], "tokenising"),
        (["report", "ADAPTER", "--output", "OUTPUT"], "importing the libraries"),
        (["import", "RECIPE", "--output", "OUTPUT"], "importing the libraries"),
    ],
)
@pytest.mark.parametrize("action", ["term", "int"])
def test_a_signal_in_another_command(case: Any, tmp_path: Path, command: list[str], at: str, action: Action) -> None:
    output = tmp_path / "made" / "output"
    output.parent.mkdir()
    places = {"ADAPTER": str(case.whole), "OUTPUT": str(output), "RECIPE": str(case.recipe)}
    for name, place in places.items():
        command = [word.replace(name, place) for word in command]
    at = at.replace("OUTPUT", output.name)
    assert ended(command, tmp_path / "screen" / "output", at, action) == STATUS[action]
    line = said(tmp_path / "screen" / "output", action)
    kept = "what is tokenised is kept" if command[0] == "preprocess" else "nothing was written"
    assert line.startswith(f"interrupted while {at}: {kept}; start it again with ")
    assert list(output.parent.iterdir()) == []


def rank_main(rank: int, port: int, recipe: str, output: Path, at: At) -> None:
    """A rank of two, whose screen is its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    words = ["train", recipe, "--set", f"training.output_dir={output}", *PROBED]
    child(words, output.parent / str(rank) / "output", at, "term")


@pytest.mark.parametrize(
    "signalled", [(0, 1), pytest.param((1,), marks=pytest.mark.faults), pytest.param((0,), marks=pytest.mark.faults)]
)
def test_a_signal_to_ranks_before_training_ends_all(case: Any, tmp_path: Path, signalled: tuple[int, ...]) -> None:
    port, processes = free_port(), []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        at = "probing the model" if rank in signalled else None
        given = (rank, port, str(case.recipe), tmp_path / "output", at)
        processes.append(FORKED.Process(target=rank_main, args=given))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    shown = [screen(tmp_path / str(rank) / "output") for rank in range(2)]
    assert "Traceback" not in shown[0] + shown[1]
    assert shown[0].count("SIGTERM: interrupted while probing the model: this command has trained nothing; start") == 1
    assert "SIGTERM" not in shown[1]
    record = tmp_path / "output" / "run.json"  # rank 0 alone may have gone on
    assert not record.exists() or json.loads(record.read_text())["status"] == "interrupted"
