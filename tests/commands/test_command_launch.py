"""deltatune train --nproc N: what is refused, what reaches the processes, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.cli import main
from deltatune.commands.launch import launch
from deltatune.config.load import load_recipe
from deltatune.training.run import train
from deltatune.training.sealed import steps_of
from forked import free_port, run_ranks

RANK = "import os, signal, subprocess, sys, time\nrank = int(os.environ['RANK'])\n"


def launched(code: str, *, nproc: int = 2) -> int:
    return launch([sys.executable, "-c", RANK + code], nproc)


def processes_of(word: str) -> list[str]:
    """Those that have a word in their command line, as far as they still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (process / "stat").read_text(), (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if word in command and stat.rpartition(")")[2].split()[0] != "Z":
            found.append(process.name)
    return found


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_another_launcher_is_refused(capsys, monkeypatch, write_recipe, name) -> None:
    monkeypatch.setenv(name, "1")
    assert main(["train", str(write_recipe()), "--nproc", "2"]) == 2
    assert f"error: --nproc starts the processes itself, and {name} is set" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(capsys, monkeypatch, write_recipe) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    recipe = str(write_recipe(training={"use_cpu": False}))
    assert main(["train", recipe, "--nproc", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: --nproc 3: 2 GPUs are here; ask for no more than that, or train on the CPU with "
        "training.use_cpu: true\n"
    )


def test_an_error_of_the_recipe_is_found_before_processes_start(capsys, monkeypatch, write_recipe) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["train", str(write_recipe()), "--nproc", "2", "--set", "lora.r=none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_options_are_passed_on(monkeypatch, write_recipe) -> None:
    from deltatune.commands import launch as module

    found: list[Any] = []
    monkeypatch.setattr(module, "launch", lambda *args: found.append(args) or 0)
    recipe = str(write_recipe())
    options = [
        "--set",
        "training.max_steps=1",
        "--set",
        "training.seed=3",
        "--resume=auto",
        "--allow-change",
        "--debug",
    ]
    assert main(["train", recipe, "--nproc", "2", *options]) == 0
    ((command, nproc),) = found
    words = command[command.index("train") :]
    assert nproc == 2
    assert words[1:4] == [recipe, "--set=training.max_steps=1", "--set=training.seed=3"]
    assert words[4:] == ["--resume=auto", "--allow-change", "--debug"]


def test_what_one_rank_prints_is_shown_and_its_status_is_the_runs(capfd) -> None:
    assert launched("print('from', rank); print('aside', rank, file=sys.stderr); sys.exit(2)") == 2
    out, err = capfd.readouterr()
    assert out == "from 0\n"
    assert err == "aside 0\n"


def test_a_rank_that_dies_without_a_word_is_named_with_what_it_said_last(capfd, monkeypatch) -> None:
    monkeypatch.setattr("deltatune.commands.launch._ENDING", 0.5)
    word = f"no-word-{os.getpid()}"
    code = f"'{word}'\nif rank == 1: sys.exit('no such kernel')\ntime.sleep(100)"
    assert launched(code) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("error: rank 1 (process ")
    assert lines[0].endswith("ended with status 1")
    assert lines[1:] == ["no such kernel"]
    assert processes_of(word) == []


def test_a_killed_rank_is_named_and_what_it_started_is_ended(capfd, monkeypatch) -> None:
    monkeypatch.setattr("deltatune.commands.launch._LEAVING", 0.5)
    word = f"killed-{os.getpid()}"
    child = f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100) # {word}'])"
    assert launched(f"{child}\nif rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)") == 1
    assert "error: rank 0 (process " in capfd.readouterr().err
    deadline = time.monotonic() + 5
    while processes_of(word) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(word) == []


CATCHES = """
def caught(number, frame):
    global count
    count += 1
    if count == 1:
        time.sleep(1.5)
        print("saved", flush=True)
        sys.exit(128 + number)
count = 0
signal.signal(signal.SIGTERM, caught)
print("ready", flush=True)
time.sleep(100)
"""


def after(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_where_ranks_meet_is_not_what_the_shell_says(capfd, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "203.0.113.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code = "import os; print(*(os.environ[name] for name in ('MASTER_ADDR', 'OMP_NUM_THREADS')), flush=True)"
    assert launch([sys.executable, "-c", code], 2) == 0
    assert capfd.readouterr().out == "localhost 3\n"


def test_a_signal_is_passed_on_and_waited_for(capfd, monkeypatch) -> None:
    monkeypatch.setattr("deltatune.commands.launch._LEAVING", 0.2)
    monkeypatch.setattr("deltatune.commands.launch._ENDING", 0.2)
    after(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert launched(CATCHES) == 143
    assert capfd.readouterr().out == "ready\nsaved\n"


def test_a_second_signal_gives_seconds(capfd, monkeypatch) -> None:
    monkeypatch.setattr("deltatune.commands.launch._LEAVING", 0.3)
    for at in (1.5, 1.8):
        after(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert launched(CATCHES.replace("1.5", "50")) == 143
    assert capfd.readouterr().out == "ready\n"


@pytest.mark.slow
def test_a_run_that_sigterm_ends_goes_on_and_equals_one_process(write_recipe, tmp_path) -> None:
    training = {"max_steps": 10_000, "lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True}
    training |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "disable_tqdm": True}
    output = tmp_path / "output"
    recipe = write_recipe(training={"output_dir": str(output), **training})
    command = [sys.executable, "-m", "deltatune", "train", str(recipe), "--nproc", "2"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        deadline = time.monotonic() + 120
        while not steps_of(output) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert processes_of(str(recipe)) == []
    (step,) = steps_of(output)
    (leg,) = json.loads((output / "run.json").read_text())["legs"]
    assert leg["command"] == f"python -m deltatune train {recipe} --nproc 2"
    said = (tmp_path / "err").read_text()
    assert said.count(f"SIGTERM: stopped after step {step} of 10000, with a checkpoint; go on with --resume\n") == 1
    assert "Traceback" not in said
    assert (tmp_path / "out").read_text().count("step 1/10000 ") == 1

    run_ranks(resumed_main, str(recipe), step + 2, free_port(), count=2)
    alone = load_recipe(recipe, ["training.gradient_accumulation_steps=2", f"training.max_steps={step + 2}"]).recipe
    training = alone.training.model_copy(update={"output_dir": str(tmp_path / "alone")})
    train(alone.model_copy(update={"training": training}))
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "alone", output))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def resumed_main(rank: int, recipe: str, steps: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    train(load_recipe(Path(recipe), [f"training.max_steps={steps}"]).recipe, resume=True)
