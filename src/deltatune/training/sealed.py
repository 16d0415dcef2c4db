"""Checkpoints that are whole or not there: written beside their place, sealed with a manifest, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltatune.errors import UserError, user_path
from deltatune.phases import phase
from deltatune.training.disk import writing
from deltatune.whole import sync

__all__ = [
    "CHECKPOINT",
    "MANIFEST",
    "clear_leftovers",
    "commit",
    "damage_of",
    "has_replaced",
    "latest",
    "manifest",
    "next_place",
    "problem_of",
    "resume_point",
    "rotate",
    "seal",
    "size_problem_of",
    "staged_checkpoint",
    "steps_of",
]

CHECKPOINT = "checkpoint-"
ORDER = "saved_as"
"""What a manifest calls the place of its checkpoint among those of the folder, in the order of saving."""

MANIFEST = "manifest.json"
_STAGING = ".saving-"  # a checkpoint that is being written
_REPLACED = ".replaced-"  # one whose place another is about to take
_REMOVED = ".removed-"  # one that is being removed

_BLOCK = 1 << 20
_MAPPINGS = ("files", "recipe", "data", "digests")  # what of a manifest is read by name


@contextmanager
def staged_checkpoint(output_dir: Path, step: int) -> Iterator[Path]:
    """A folder beside the checkpoints, in which ``checkpoint-STEP`` is written; it takes its place with ``commit``.

    What a failed save leaves is removed.

    Raises:
        UserError: the disk is full, or does not take the files.
    """
    folder, place = output_dir / f"{_STAGING}{step}", output_dir / f"{CHECKPOINT}{step}"
    try:
        with writing(place, "saved", "make room, then go on from the checkpoint before with --resume"):
            yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder's files and sees to it that all of it is on the disk.

    Args:
        folder: whose files are all written.
        about: JSON that the manifest holds besides the size and the CRC-32 of each file.
    """
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        sync(path)
    target = folder / MANIFEST
    target.write_text(json.dumps({**about, "files": found}, indent=2) + "\n", encoding="utf-8")
    sync(target)
    sync(folder)


def commit(folder: Path, place: Path) -> None:
    """Moves a sealed folder to its place. Another folder there is removed only when the new one stands in it."""
    replaced = place.parent / f"{_REPLACED}{place.name}"
    if os.path.lexists(place):  # a link to nothing is in the way too
        _remove(replaced)
        place.rename(replaced)
    folder.rename(place)
    sync(place.parent)
    _remove(replaced)


def clear_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left beside its checkpoints, and puts back one whose place none has taken."""
    for path in output_dir.glob(f"{_REPLACED}{CHECKPOINT}*"):
        place = output_dir / path.name.removeprefix(_REPLACED)
        if place.exists():
            _remove(path)
        else:
            place.unlink(missing_ok=True)  # a link to nothing
            path.rename(place)
    for name in (_STAGING, _REMOVED):
        for path in output_dir.glob(f"{name}*"):
            _remove(path)


def has_replaced(output_dir: Path) -> bool:
    """Whether a killed run left a checkpoint whose place another was about to take."""
    return any(output_dir.glob(f"{_REPLACED}{CHECKPOINT}*"))


def resume_point(
    output_dir: Path, resume: str | Path | bool | None, *, clears: bool = True
) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what should be said of those that were passed over.

    A given folder, for ``True`` the last whole one of ``output_dir``, and for ``"auto"`` the same if there is one. What
    a killed run left beside its checkpoints is cleared, unless ``clears`` is false: then nothing is written, and of a
    checkpoint's files names and sizes are looked at.

    Raises:
        UserError: nothing there to resume from, or a given folder that is not whole; or, for a run from the beginning,
            checkpoints of another one.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"training.output_dir: {output_dir} is a file; choose a folder")
    if clears:
        clear_leftovers(output_dir)
    found = steps_of(output_dir)
    if resume is None or resume is False:
        if found:
            raise UserError(
                f"training.output_dir: {output_dir} holds checkpoints of an earlier run; continue it with --resume, "
                "or choose another folder"
            )
        return None, []
    if resume is not True and resume != "auto":
        folder = user_path(resume).resolve()  # a link's place says what lies beside it
        if problem := problem_of(folder, reads=clears):
            raise UserError(f"{folder} is no whole checkpoint: {problem}; take another one")
        return folder, []
    whole: Path | None = None
    broken: list[str] = []
    for path in found.values():
        if whole is not None and not path.is_dir():
            continue
        # what comes behind a whole one is older, or nothing says how old it is
        problem = problem_of(path, reads=clears) if whole is None else _unreadable(path)
        if problem:
            broken.append(f"{path} is passed over: {problem}")
        elif whole is None:
            whole = path
    if whole is not None:
        return whole, broken
    if broken:
        raise UserError(f"{output_dir} holds no whole checkpoint; {broken[0]}; remove the checkpoints to start again")
    if resume == "auto":
        return None, []
    raise UserError(f"{output_dir} holds no checkpoint to resume from; start without --resume, or say --resume auto")


def problem_of(folder: Path, *, reads: bool = True) -> str | None:
    """Why a run cannot go on from a folder; None for a whole checkpoint, whose content is read if ``reads``."""
    return _no_start(folder) or (damage_of if reads else size_problem_of)(folder)


def latest(output_dir: Path) -> Path | None:
    """The checkpoint that was saved last of those that have all of their files, whose content is not read."""
    found = steps_of(output_dir).values()
    return next((path for path in found if not (_no_start(path) or size_problem_of(path))), None)


def _no_start(folder: Path) -> str | None:
    if problem := _unreadable(folder):
        return problem
    if not any(name.startswith("optimizer") for name in manifest(folder)["files"]):
        return "it holds no optimizer's state (training.save_only_model), so nothing can go on from it"
    return None


def damage_of(folder: Path) -> str | None:
    """What of a checkpoint's files is not as it was written; None where all are."""
    if problem := size_problem_of(folder):
        return problem
    with phase(f"checking {folder.name}"):
        for name, expected in manifest(folder)["files"].items():
            if _crc32(folder / name) != expected["crc32"]:
                return f"{name} is not what was written"
    return None


def size_problem_of(folder: Path) -> str | None:
    """Which of a checkpoint's files is missing or of another size; their content is not read."""
    if problem := _unreadable(folder):
        return problem
    for name, expected in manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes of {expected['bytes']:,}"
    return None


def _unreadable(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest(folder)["files"]
    except (OSError, ValueError):
        return f"it holds no {MANIFEST} that can be read"
    return None


def manifest(folder: Path) -> dict[str, Any]:
    """What ``seal`` wrote.

    Raises:
        OSError, ValueError: there is none, or it is broken.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{folder / MANIFEST} is nested too deeply") from error
    if not _is_manifest(found):
        raise ValueError(f"{folder / MANIFEST} holds no files with their sizes and sums")
    return dict(found)


def _is_manifest(found: Any) -> bool:
    if not isinstance(found, dict) or not all(isinstance(found.get(name, {}), dict) for name in _MAPPINGS):
        return False
    entries = found.get("files", {}).values()
    sums = [entry.get(name) if isinstance(entry, dict) else None for entry in entries for name in ("bytes", "crc32")]
    return bool(sums) and all(type(value) is int for value in (*sums, found.get(ORDER, 0)))


def steps_of(output_dir: Path) -> dict[int, Path]:
    """The folders that are named as checkpoints, by their step, the one that was saved last first.

    A run that went on from an earlier one leaves later steps of the run before it: these are the older ones, and so are
    those whose manifest cannot be read.
    """
    named = ((path.name.removeprefix(CHECKPOINT), path) for path in output_dir.glob(f"{CHECKPOINT}*"))
    found = [(int(step), path) for step, path in named if step.isdecimal()]
    return dict(sorted(found, key=lambda each: (_place(each[1]), each[0]), reverse=True))


def next_place(output_dir: Path) -> int:
    """The place of the checkpoint that is saved next: after all that are there."""
    return max(map(_place, steps_of(output_dir).values()), default=0) + 1


def _place(folder: Path) -> int:
    """0 where nothing says it, and steps alone tell."""
    try:
        return int(manifest(folder).get(ORDER, 0))
    except (OSError, ValueError):
        return 0


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond the limit; the best one stays and counts."""
    if not limit or limit < 0:
        return
    folders = list(steps_of(output_dir).values())
    kept = [path for path in folders if best is not None and path.resolve() == Path(best).resolve()]
    kept += [path for path in folders if path not in kept][: max(limit - len(kept), 1)]
    for path in folders:
        if path not in kept:
            # half a checkpoint would otherwise stay under its name where this is the last that a process does
            removed = path.with_name(f"{_REMOVED}{path.name}")
            path.rename(removed)
            _remove(removed)


def _remove(path: Path) -> None:
    """Removes a folder, or the link to one: what it points to is somebody else's."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
