"""Small runs in processes of their own, and what may happen to them at any of their writes."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file
from training_cases import byte_tokenizer, write_conversations, write_pairs

from deltatune import phases
from deltatune.cli import main as deltatune
from deltatune.config.load import dump_recipe, parse_recipe
from deltatune.training import packs
from deltatune.training.console import RunConsole
from deltatune.training.sealed import problem_of, steps_of
from forked import FORKED
from tiny import tiny_model

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "pause": signal.SIGSTOP}
Action = Literal["kill", "full", "term", "int", "pause", "count"]
At = int | str | None
STEPS = 6
BLOCK_ROWS = 24  # of a stream: it is in its second block where a checkpoint is saved

#: What of a recipe makes its checkpoints hold other files, or its steps read other state.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lora": None},
    "streamed": {"data": {"streaming": True}},
    "preference": {"preference": {}},
}


def make_case(folder: Path, kind: str, words: Sequence[str] = ()) -> Path:
    """A checkpoint, rows and a recipe that saves at every second of its six steps; ``words`` are laid over it."""
    tokenizer = byte_tokenizer()
    tiny_model("qwen3", layers=1, vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write = write_pairs if kind == "preference" else write_conversations
    rows = write(folder / "train.jsonl", 60)
    write(folder / "eval.jsonl", 12, first=60)
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": [{"path": str(rows)}], "cache_dir": str(folder / "cache"), "num_proc": 1},
        "packing": {"tokens_per_batch": 192},
        "lora": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        "training": {
            "output_dir": str(folder / "output"),
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "verify": {"enabled": False},
    }
    for name, section in KINDS[kind].items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    given = parse_recipe(
        yaml.safe_dump(recipe), "recipe.yaml", [word.replace("{folder}", str(folder)) for word in words]
    )
    (folder / "recipe.yaml").write_text(dump_recipe(given.recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def run(recipe: Path, output_dir: Path, *words: str, at: At = None, action: Action = "count") -> int:
    """``deltatune train`` in a process of its own; its exit status, negative for the signal that ended it.

    ``at``: the write, counted from 1, or the phase, by its first words, at which ``action`` happens. What is written to
    the screen is in ``screen.txt`` beside the folder, and the writes in ``writes.txt``.
    """
    arguments = ["train", str(recipe), "--set", f"training.output_dir={output_dir}", *words]
    return ended(arguments, output_dir, at, action)


def ended(arguments: list[str], output_dir: Path, at: At = None, action: Action = "count") -> int:
    """The same of any command."""
    process = start(arguments, output_dir, at, action)
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def start(arguments: list[str], output_dir: Path, at: At = None, action: Action = "count") -> Any:
    """The process of a run, started."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    process = FORKED.Process(target=child, args=(arguments, output_dir, at, action))
    process.start()
    return process


def child(arguments: list[str], output_dir: Path, at: At, action: Action) -> None:
    """The main function of such a process."""
    torch.set_num_threads(1)
    screen = os.open(output_dir.parent / "screen.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(screen, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    packs.BLOCK_ROWS = BLOCK_ROWS
    if isinstance(at, str):
        act_in_phase(at, action)
    watch_writes(output_dir, None if isinstance(at, str) else at, action)
    sys.exit(deltatune(arguments))


def act_in_phase(name: str, action: Action) -> None:
    """Sends the group of this process a signal, as a terminal does, as it enters a phase whose name begins so."""
    os.setsid()
    shown, nobody = RunConsole.phase, phases._nobody

    def act(entered: str) -> None:
        if entered.startswith(name):
            # by another process: one of its parent means something else to a process that loads data
            subprocess.run(["kill", f"-{int(_SIGNALS[action])}", "--", f"-{os.getpgrp()}"], check=False)

    def phase(self: RunConsole, entered: str, total: int | None = None) -> Any:
        act(entered)
        return shown(self, entered, total)

    def unseen(entered: str, total: int | None) -> Any:
        act(entered)
        return nobody(entered, total)

    RunConsole.phase, phases._nobody = phase, unseen


def watch_writes(folder: Path, at: int | None, action: Action) -> None:
    """Counts what this process does to the disk below a folder, and acts before one of these writes, or within it."""
    log = os.open(folder.parent / "writes.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def note(what: str, path: Any) -> None:
        nonlocal count
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = Path(os.fsdecode(path)).absolute()
        if not place.is_relative_to(folder):
            return
        count += 1
        os.write(log, f"{count} {what} {place.relative_to(folder)}\n".encode())
        if count != at:
            return
        if action == "full" and what not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        if action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[action])

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            handle = arguments[-1]  # of the folder that the name is in, as where a tree is removed
            inside = isinstance(handle, int) and handle >= 0 and event in ("os.remove", "os.rmdir")
            note(event, (Path(f"/proc/self/fd/{handle}").readlink() / arguments[0]) if inside else arguments[0])

    def opening(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        writes = set(mode) & set("wax+")
        if writes:
            note("open", file)
        opened = plain_open(file, mode, *rest, **named)
        if writes:
            note("opened", file)  # empty, where it was there before
        return opened

    def torn(write: Callable[..., Any], path_at: int) -> Callable[..., Any]:
        """Libraries that write in other languages: nothing yet, then half of it, then all."""

        def writing(*given: Any, **named: Any) -> Any:
            note("before", given[path_at])
            result = write(*given, **named)
            path = given[path_at]
            whole = Path(path).read_bytes()
            with plain_open(path, "r+b") as stream:
                stream.truncate(len(whole) // 2)
            note("half of", path)
            with plain_open(path, "wb") as stream:
                stream.write(whole)
            return result

        return writing

    def syncing(handle: int) -> None:
        note("fsync", Path(f"/proc/self/fd/{handle}").readlink())
        plain_sync(handle)

    plain_open, plain_sync = io.open, os.fsync
    sys.addaudithook(audit)
    os.fsync = syncing
    builtins.open = io.open = opening
    torch.save = torn(torch.save, 1)
    safetensors.torch.serialize_file = torn(safetensors.torch.serialize_file, 1)


def writes(output_dir: Path) -> list[str]:
    """What the latest run in a folder wrote, in order."""
    return (output_dir.parent / "writes.txt").read_text().splitlines()


def screen(output_dir: Path) -> str:
    """What the latest run in a folder said."""
    return (output_dir.parent / "screen.txt").read_text()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of an adapter, or of a whole model."""
    files = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def check_same(found: Path, expected: Path) -> None:
    """A finished run's weights, last checkpoint and losses are those of another, to the bit; nothing else is left."""
    ours, theirs = (weights_of(folder) for folder in (found, expected))
    assert theirs
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    last = [folder / f"checkpoint-{STEPS}" for folder in (found, expected)]
    assert problem_of(last[0]) is None
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in last]
    assert all(
        torch.equal(states[0][number][name], value)
        for number, state in states[1].items()
        for name, value in state.items()
    )
    assert losses(last[0]) == losses(last[1])
    # a signal saves one more, so the checkpoints that are kept may be others
    assert len(steps_of(found)) == len(steps_of(expected))
    left = [
        {path.name for path in folder.iterdir()} - {path.name for path in steps_of(folder).values()}
        for folder in (found, expected)
    ]
    assert left[0] == left[1]
    assert json.loads((found / "run.json").read_text())["status"] == "finished"


def losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
