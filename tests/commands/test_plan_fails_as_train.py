"""What stops a run before its first step stops its plan, in the same words."""

from __future__ import annotations

import ast
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import deltatune
from deltatune.cli import main
from deltatune.training import run as run_module
from deltatune.training.processes import started

ROOT = Path(deltatune.__file__).parent
ERRORS = ("UserError", "DataError", "RecipeKeyError")
#: What stops a run alone, since a plan reads no weights, writes nothing, computes nothing and is one process.
OF_RUNS = {
    "training/beginning.py:check_nothing_saved": "writes",
    "training/checkpoint.py:_loaded": "reads weights",
    "training/interruption.py:told_of_memory": "computes",
    "training/interruption.py:told_what_is_kept": "computes",
    "training/layout.py:shard_by_recipe": "fills the weights of several processes",
    "training/loading.py:load_by_recipe": "reads weights",
    "training/lock.py:locked": "writes",
    "training/probing.py:probe": "computes",
    "training/resuming.py:_check_seen": "what processes see of one checkpoint",
    "training/resuming.py:decided_by_rank_0": "says again what rank 0 says",
}


def raises_for_users(node: ast.AST) -> bool:
    """Whether a function raises one of ours itself, not by a function inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        call = child.exc if isinstance(child, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ERRORS:
            return True
        if raises_for_users(child):
            return True
    return False


def checks() -> set[tuple[str, str, int]]:
    """File, name and line of every function that may stop a command in words for users."""
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and raises_for_users(node):
                line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found.add((str(file), node.name, line))
    return found


class Stopped(BaseException):
    """Before the first step."""


def called_by(*arguments: str) -> set[CodeType]:
    """Our functions that a command calls."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        assert main(list(arguments)) == 0
    except Stopped:
        pass
    finally:
        sys.setprofile(None)
    return found


SETTINGS = (
    *("data.val_size=2", "training.eval_strategy=steps", "samples={prompts: [why], held_out: 1}"),
    *("training.learning_rates={q_proj: 1e-3}", "model.added_tokens=[<new>]", "model.chat_template=chatml"),
    *("training.unfrozen_parameters=[norm]", "lora.rank_pattern={q_proj: 2}", "parallel.sequence=1"),
)


@pytest.mark.parametrize("goes_on", [False, True])
def test_every_check_of_a_run_is_one_of_its_plan(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, goes_on: bool
) -> None:
    arguments = [str(write_recipe()), *(word for setting in SETTINGS for word in ("--set", setting))]
    if goes_on:
        assert main(["train", *arguments, "--set", "training.save_strategy=steps"]) == 0
        arguments += ["--resume"]

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(run_module, "_run_steps", stop)
    # the plan first, since some answers are kept; each has rows to render
    of_plan = called_by("plan", *arguments, "--set", f"data.cache_dir={tmp_path / 'other'}")
    of_run = called_by("train", *arguments)
    known = checks()
    alone = {
        f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_name}"
        for code in of_run - of_plan
        if (code.co_filename, code.co_name, code.co_firstlineno) in known
    }
    assert len([code for code in of_plan if (code.co_filename, code.co_name, code.co_firstlineno) in known]) > 30
    assert alone == OF_RUNS.keys()


def holds_checkpoint(output: Path) -> list[str]:
    (output / "checkpoint-1").mkdir(parents=True)
    return []


def holds_adapter(output: Path) -> list[str]:
    output.mkdir()
    (output / "adapter_config.json").write_text("{}")
    return []


def holds_model(output: Path) -> list[str]:
    output.mkdir()
    (output / "config.json").write_text("{}")
    return []


def is_in_use(output: Path) -> list[str]:
    output.mkdir()
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "started": started(os.getppid())}
    (output / ".lock").write_text(json.dumps(holder))
    return []


def holds_half_a_checkpoint(output: Path) -> list[str]:
    return [*holds_checkpoint(output), "--resume"]


def holds_nothing(output: Path) -> list[str]:
    output.mkdir()
    return ["--resume"]


def has_a_folder_for_a_file(output: Path) -> list[str]:
    (output / "run.jsonl").mkdir(parents=True)
    return []


def has_a_lock_that_is_a_link(output: Path) -> list[str]:
    output.mkdir()
    (output / ".lock").symlink_to(output / "gone")
    return []


def is_elsewhere(output: Path) -> list[str]:
    return ["--resume", str(output.parent / "elsewhere")]


FOLDERS: dict[Callable[[Path], list[str]], str] = {
    holds_checkpoint: "holds checkpoints of an earlier run; continue it with --resume",
    holds_adapter: "holds the model of an earlier run, and no checkpoint that --resume could go on from",
    holds_model: "holds a model (config.json), and this run saves an adapter",
    is_in_use: "is in use by process",
    holds_half_a_checkpoint: "holds no whole checkpoint",
    holds_nothing: "holds no checkpoint to resume from",
    has_a_folder_for_a_file: "run.jsonl is a folder, and the run writes a file of that name",
    has_a_lock_that_is_a_link: ".lock is a link to nothing",
    is_elsewhere: "is no whole checkpoint: there is no such folder",
}


@pytest.mark.parametrize(("left", "message"), FOLDERS.items(), ids=[left.__name__ for left in FOLDERS])
def test_what_an_earlier_run_left(
    capsys: pytest.CaptureFixture[str], write_recipe: Any, tmp_path: Path, left: Any, message: str
) -> None:
    recipe, options = str(write_recipe()), left(tmp_path / "output")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for command in ("plan", "train"):
        assert main([command, recipe, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("resume", ["--resume", "--resume=auto"])
def test_a_checkpoint_that_a_killed_run_was_replacing_is_left_to_the_run(
    write_recipe: Any, tmp_path: Path, resume: str
) -> None:
    (tmp_path / "output" / ".replaced-checkpoint-1").mkdir(parents=True)
    assert main(["plan", str(write_recipe()), resume]) == 0
    assert (tmp_path / "output" / ".replaced-checkpoint-1").exists()


@pytest.mark.parametrize(
    "settings",
    [
        "training.use_cpu=false training.optim=adamw_8bit",
        "training.report_to=flyte",
        "training.optim=sgd training.optim_args=momentum",
        "training.dataloader_num_workers=1 training.dataloader_prefetch_factor=0",
        "training.use_cpu=false training.tf32=true",
        "model.special_tokens={eos_token:<no>}",
    ],
)
def test_what_a_recipe_asks_for(capsys: pytest.CaptureFixture[str], write_recipe: Any, settings: str) -> None:
    arguments = [str(write_recipe()), *(word for setting in settings.split() for word in ("--set", setting))]
    capsys.readouterr()
    said = []
    for command in ("plan", "train"):
        assert main([command, *arguments]) == 2
        said += capsys.readouterr().err.splitlines()
    assert said[0] == said[1]
    assert len(said) == 2
