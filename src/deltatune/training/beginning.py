"""Where a run begins in its folder: what an earlier run left there, looked at without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from deltatune.config.schema import Recipe
from deltatune.errors import UserError, user_path
from deltatune.training.lock import check_free, clear_stale
from deltatune.training.sealed import has_replaced, next_place, resume_point

__all__ = ["MARKERS", "Resume", "begin", "check_nothing_saved", "holds_model", "saved_so_far"]

Resume = str | Path | bool | None

# Readers tell an adapter or a model by these files, so they are moved into place last.
MARKERS = ("adapter_config.json", "config.json")

# files that a run goes on writing, and those that it puts others in the place of
_APPENDED: Final = ("run.jsonl", "samples.jsonl", "train.log")
_REPLACED: Final = (
    *("config.yaml", "metrics.json", "report.json", "run.json", "README.md", *MARKERS),
    *("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"),
    *("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
)


def begin(recipe: Recipe, resume: Resume, *, clears: bool) -> tuple[Path | None, list[str]]:
    """``resume_point`` of a recipe's folder, after what stands in the way of a run there.

    Args:
        recipe: the run.
        resume: as ``deltatune train --resume``.
        clears: remove what a killed run left, and read every byte of a checkpoint; False looks at names and sizes.

    Raises:
        UserError: another run that goes on, what a run of the other kind left, a model that no checkpoint goes on to,
            a file that cannot be written to, or as ``resume_point``.
    """
    output_dir = user_path(recipe.training.output_dir)
    # what another run is writing there looks like what a killed one left
    check_free(output_dir)
    if clears:
        clear_stale(output_dir)
    if not clears and has_replaced(output_dir):
        return None, []  # what goes on is known once it is put back
    found = resume_point(output_dir, resume, clears=clears)
    _check_files(output_dir)
    _check_kind(output_dir, adapter=recipe.lora is not None)
    if found[0] is None and holds_model(output_dir):
        raise UserError(
            f"training.output_dir: {output_dir} holds the model of an earlier run, and no checkpoint that --resume "
            "could go on from; choose another folder, or remove that model"
        )
    return found


def saved_so_far(output_dir: Path) -> tuple[int, bool]:
    """What tells whether a run saves in a folder: the place of its next checkpoint, and whether a model is there."""
    return next_place(output_dir), holds_model(output_dir)


def check_nothing_saved(output_dir: Path, before: tuple[int, bool]) -> None:
    """Refuses a folder that another run has saved in since ``begin``, which this one now holds.

    Args:
        output_dir: the run's folder.
        before: ``saved_so_far`` as it was then.

    Raises:
        UserError: another run has, while this one read its data and loaded its model.
    """
    if saved_so_far(output_dir) != before:
        raise UserError(
            f"training.output_dir: another run has saved in {output_dir} since this one began; go on from there with "
            "--resume, or choose another folder"
        )


def holds_model(output_dir: Path) -> bool:
    """Whether a folder holds an adapter or a model."""
    return any((output_dir / name).is_file() for name in MARKERS)


def _check_files(output_dir: Path) -> None:
    """Refuses a folder in the place of a file that the run writes, and a record that it may not go on with."""
    for path in (output_dir / name for name in (*_APPENDED, *_REPLACED)):
        if path.is_dir():
            raise UserError(
                f"training.output_dir: {path} is a folder, and the run writes a file of that name; choose another "
                "folder for the run, or remove it"
            )
        if path.name in _APPENDED and path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"training.output_dir: {path} cannot be written to; change its permissions")


def _check_kind(output_dir: Path, *, adapter: bool) -> None:
    """Refuses a folder that holds what a run of the other kind left: loaders would read a mixture of both."""
    other = MARKERS[1] if adapter else MARKERS[0]
    if (output_dir / other).is_file():
        kinds = ("a model", "an adapter") if adapter else ("an adapter", "a model")
        raise UserError(
            f"training.output_dir: {output_dir} holds {kinds[0]} ({other}), and this run saves {kinds[1]}; choose "
            "another folder"
        )
