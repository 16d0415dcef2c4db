"""What happened in a run, kept in its folder: run.json tells of each leg, run.jsonl holds every log entry."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.training.export import finite, write_json

__all__ = ["RUN_FILE", "RunRecord"]

RUN_FILE, LOG_FILE = "run.json", "run.jsonl"


class RunRecord(TrainerCallback):  # type: ignore[misc]
    """Writes both files as the run goes; a run that goes on adds a leg.

    A leg in ``run.json`` has ``status`` (running, finished, interrupted, failed), ``command``, the ``folder`` it ran
    in, ``host``, ``git`` (the commit of that folder), ``started`` and ``ended`` (UTC), ``from_step``, ``to_step``, the
    ``changes`` since the leg before, and what the run says of itself: versions, device, data. A line of ``run.jsonl``
    is one log entry with its ``leg`` and ``time``.
    A killed run leaves ``running``.
    """

    def __init__(self, output_dir: Path, about: Mapping[str, Any], *, changes: list[str], from_step: int) -> None:
        self._output_dir = output_dir
        self._legs: list[dict[str, Any]] = _legs(output_dir / RUN_FILE)
        self._legs.append(
            {
                "status": "running",
                "command": shlex.join(sys.argv),
                "folder": str(Path.cwd()),
                "host": platform.node(),
                "git": _git(),
                "started": _now(),
                "ended": None,
                "from_step": from_step,
                "to_step": from_step,
                "changes": changes,
                **about,
            }
        )
        self._write()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a log entry to ``run.jsonl``."""
        del args, control, kwargs
        if logs is None or not state.is_world_process_zero:
            return
        self.add({"step": state.global_step, **logs})
        self._legs[-1]["to_step"] = state.global_step

    def add(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to ``run.jsonl``: what has happened at ``entry["step"]``."""
        line = json.dumps(finite({"leg": len(self._legs), "time": _now(), **entry}))
        with (self._output_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes how far a leg came that may be killed later."""
        del args, control, kwargs
        self._legs[-1]["to_step"] = state.global_step
        self._write()

    def end(self, status: str, step: int, reason: str | None = None) -> None:
        """Closes the leg."""
        self._legs[-1].update(status=status, ended=_now(), to_step=step, **({"reason": reason} if reason else {}))
        self._write()

    def _write(self) -> None:
        write_json(self._output_dir / RUN_FILE, {"status": self._legs[-1]["status"], "legs": self._legs})


def _legs(file: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["legs"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> str | None:
    """The commit of the folder that the command runs in, with a mark if it was changed."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
