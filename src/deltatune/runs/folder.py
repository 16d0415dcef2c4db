"""A run's folder, read as far as it goes: a run may be going on, or have ended in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltatune.errors import UserError, near_files

__all__ = ["RunFolder", "items", "labels", "mapping", "number", "read_run", "rows"]

_LARGEST = 1e150
_DEEPEST = 64  # levels of lists and mappings in a file; no run writes half as many
_FILES = ("run.json", "run.jsonl", "config.yaml", "report.json", "metrics.json")


@dataclass(frozen=True)
class RunFolder:
    """What the files of a run say; empty where there is no such file, or none that can be read."""

    path: Path
    record: dict[str, Any]  # run.json
    entries: list[dict[str, Any]]  # run.jsonl
    recipe: dict[str, Any]  # config.yaml
    report: dict[str, Any]  # report.json
    metrics: dict[str, Any]  # metrics.json
    samples: list[dict[str, Any]]  # samples.jsonl
    log: str  # train.log
    problems: tuple[str, ...]  # what could not be read, one line each
    written: float  # when its record was last written, in seconds since the epoch; 0 where there is none

    @property
    def legs(self) -> list[dict[str, Any]]:
        """The processes that worked on the run, in order."""
        return rows(self.record.get("legs"))

    @property
    def status(self) -> str:
        """Of the last leg, in a word."""
        return str(self.record.get("status") or "unknown")

    def series(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a figure of the log, in order; what a later leg did over is left out.

        Values that are no finite numbers come as NaN.
        """
        begins = [int(number(leg.get("from_step")) or 0) for leg in self.legs]
        found = {}
        for entry in self.entries:
            step, leg = number(entry.get("step")), number(entry.get("leg")) or 1
            if name in entry and step is not None and all(step <= begin for begin in begins[int(leg) :]):
                found[int(step)] = number(entry[name], unreadable=math.nan)
        return sorted((step, value) for step, value in found.items() if value is not None)


def read_run(path: Path) -> RunFolder:
    """What a folder tells of the run in it.

    Raises:
        UserError: no folder, or one that no run has written to.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected the training.output_dir of a run{near_files(path)}")
    there = [path / name for name in _FILES if (path / name).is_file()]
    if not there:
        raise UserError(f"{path} holds no run: none of {', '.join(_FILES)}; expected the training.output_dir of a run")
    problems: list[str] = []
    return RunFolder(
        path,
        _json(path / "run.json", problems),
        _lines(path / "run.jsonl", problems),
        _yaml(path / "config.yaml", problems),
        _json(path / "report.json", problems),
        _json(path / "metrics.json", problems),
        _lines(path / "samples.jsonl", problems),
        _text(path / "train.log", problems) or "",
        tuple(problems),
        max((file.stat().st_mtime for file in there if file.name in _FILES[:2]), default=0.0),
    )


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: the end of its path, as long as it takes to tell it from the others."""
    paths = [run.path.expanduser().resolve() for run in runs]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = range(1, len(path.parts) + 1)
        ends = next((n for n in lengths if all(other.parts[-n:] != path.parts[-n:] for other in others)), 1)
        names.append("/".join(path.parts[-ends:]))
    return names


def number(value: Any, unreadable: float | None = None) -> float | None:
    """A finite number, or ``unreadable``: JSON holds what is none as text.

    Magnitudes beyond 1e150 are none, and those below 1e-150 are 0: a record of real things has neither, and sums and
    differences of the others stay finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return unreadable
    return float(value) if abs(value) >= 1 / _LARGEST else 0.0


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """The value if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def rows(value: Any) -> list[dict[str, Any]]:
    """The objects in a JSON list."""
    return [row for row in items(value) if isinstance(row, dict)]


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(file, problems)
    if text is None:
        return {}
    try:
        return mapping(_shallow(json.loads(text)))
    except (ValueError, RecursionError) as error:
        problems.append(f"{file.name} is not whole: {error}")
        return {}


def _shallow(value: Any) -> Any:
    """The value, if nothing in it is nested too deeply to walk through.

    Raises:
        ValueError: it is.
    """
    level = [value]
    for _ in range(_DEEPEST):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [item for part in parts for item in part]
        if not level:
            return value
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    def parsed() -> Iterator[Any]:
        # the text of a sample may hold what Python, but not JSON, takes for the end of a line
        lines = (_text(file, problems) or "").rstrip("\n").split("\n")
        for place, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield _shallow(json.loads(line))
            except (ValueError, RecursionError):
                # a run that goes on, or was killed, may be in the middle of its last line
                if place < len(lines):
                    problems.append(f"{file.name}: line {place} is no JSON")

    return rows(list(parsed()))


def _yaml(file: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(file, problems)
    try:
        return mapping(_shallow(yaml.safe_load(text or "")))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{file.name} is not whole: {' '.join(str(error).split())}")
        return {}


def _text(file: Path, problems: list[str]) -> str | None:
    try:
        return file.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror}")
        return None
