"""What happened in a run, kept in its folder: run.json tells of each leg, run.jsonl holds every log entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.phases import phase
from deltatune.training.export import finite, write_json
from deltatune.training.metrics import Meter
from deltatune.training.provenance import now, process_identity
from deltatune.whole import sync

__all__ = ["RUN_FILE", "RunRecord", "is_finished", "mark_ended"]

RUN_FILE, LOG_FILE = "run.json", "run.jsonl"


class RunRecord(TrainerCallback):  # type: ignore[misc]
    """Writes both files as the run goes; a run that goes on adds a leg.

    A finished run that is resumed as it was, and lacks no file, has no leg: nothing happened in it.

    ``run.json`` has the ``status`` of the last leg, the base ``model`` and the ``legs``. Of a leg it has

    - ``status``: running, finished, interrupted, failed (with a ``reason``), or killed, which the next leg finds out
    - ``command``, the ``folder`` it ran in, ``host``, ``git`` (the commit of that folder) and ``deltatune`` (its
      version, and its commit where it runs from a checkout)
    - ``started`` and ``ended`` (UTC), ``from_step``, ``to_step``, and the ``changes`` since the leg before
    - ``first_loss``, ``last_loss`` and ``eval_loss`` (the last one) of the leg's log lines
    - ``seconds``, ``packs``, ``tokens`` and ``trained_tokens`` up to its last log line
    - what the run says of itself: versions, device, data

    A line of ``run.jsonl`` is one log entry with its ``leg`` and ``time``.

    Args:
        output_dir: the run's folder.
        about: JSON that the leg holds besides.
        model: what the run began with, as ``base_identity`` says it.
        changes: in words.
        from_step: the step of the checkpoint that the leg goes on from.
        meter: counts what the leg trains on.
    """

    def __init__(
        self,
        output_dir: Path,
        about: Mapping[str, Any],
        *,
        model: Mapping[str, Any],
        changes: list[str],
        from_step: int,
        meter: Meter,
    ) -> None:
        self._output_dir, self._model, self._meter = output_dir, model, meter
        self._legs: list[dict[str, Any]] = _legs(output_dir / RUN_FILE)
        _end_last_line(output_dir / LOG_FILE)
        for leg in self._legs:
            if leg.get("status") == "running":  # nobody else is in this folder
                leg["status"] = "killed"
        self._legs.append(
            {
                "status": "running",
                **process_identity(),
                "started": now(),
                "ended": None,
                "from_step": from_step,
                "to_step": from_step,
                "first_loss": None,
                "last_loss": None,
                "eval_loss": None,
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
        self._note(state.global_step, logs)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to ``run.jsonl``: what has happened at ``entry["step"]``."""
        line = json.dumps(finite({"leg": len(self._legs), "time": now(), **entry}))
        with (self._output_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes how far a leg came that may be killed later."""
        del args, control, kwargs
        self._legs[-1]["to_step"] = state.global_step
        self._write()

    def end(self, status: str, step: int, reason: str | None = None, ending: Mapping[str, Any] | None = None) -> None:
        """Closes the leg, with what ``ending`` says of it, once all other files of the run are on the disk."""
        self._legs[-1].update(status=status, ended=now(), to_step=step, **(ending or {}))
        self._legs[-1].update({"reason": reason} if reason else {})
        with phase("waiting for the disk"):
            for path in self._output_dir.iterdir():
                if path.is_file():
                    sync(path)
            sync(self._output_dir)
        self._write(synced=True)

    def _note(self, step: int, logs: Mapping[str, Any]) -> None:
        leg = self._legs[-1]
        leg["to_step"] = step
        if "loss" in logs:
            leg["first_loss"] = logs["loss"] if leg["first_loss"] is None else leg["first_loss"]
            leg["last_loss"] = logs["loss"]
            done = self._meter.logged
            counts = {"packs": done.counts.packs, "tokens": done.counts.tokens, "trained_tokens": done.counts.trained}
            leg.update(seconds=round(done.seconds, 3), **counts)
        leg["eval_loss"] = logs.get("eval_loss", leg["eval_loss"])
        self._write()

    def _write(self, *, synced: bool = False) -> None:
        record = {"status": self._legs[-1]["status"], "model": self._model, "legs": self._legs}
        write_json(self._output_dir / RUN_FILE, record, synced=synced)


def is_finished(output_dir: Path) -> bool:
    """Whether the record says that the last leg of a run ended well."""
    legs = _legs(output_dir / RUN_FILE)
    return bool(legs) and legs[-1].get("status") == "finished"


def mark_ended(output_dir: Path, status: str, reason: str, since: str) -> None:
    """Closes the leg of a run whose own process cannot: one that began after ``since`` (UTC, ISO 8601) and runs."""
    file = output_dir / RUN_FILE
    legs = _legs(file)
    if not legs or legs[-1].get("status") != "running" or str(legs[-1].get("started")) < since:
        return
    legs[-1].update(status=status, ended=now(), reason=reason)
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "status": status, "legs": legs}, synced=True)


def _legs(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    legs = found.get("legs") if isinstance(found, dict) else None
    return [leg for leg in legs if isinstance(leg, dict)] if isinstance(legs, list) else []


def _end_last_line(file: Path) -> None:
    """Removes what a killed run, or a full disk, left of a line: the next would become a part of it."""
    content = file.read_bytes() if file.is_file() else b""
    whole, end, _ = content.rpartition(b"\n")
    if not content.endswith(b"\n") and content:
        with file.open("r+b") as stream:
            stream.truncate(len(whole + end))
