"""What is another than at the checkpoint that a run goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from deltatune.config.schema import Recipe, Source
from deltatune.data.stream import Place
from deltatune.errors import UserError
from deltatune.parallel.mesh import Mesh
from deltatune.training.batches import place_file
from deltatune.training.changes import Change, check_changes, find_changes, find_other_data
from deltatune.training.packs import RecipeData, rows_digest
from deltatune.training.resuming import state_of
from deltatune.training.sealed import manifest
from deltatune.training.weights_digest import STARTS, digest_of

__all__ = [
    "PACKS_PER_STEP",
    "change_lines",
    "changed_data",
    "changed_settings",
    "changed_steps",
    "evaluates_otherwise",
    "place_of",
]

PACKS_PER_STEP = "packs_per_step"
"""What a checkpoint's manifest calls the packs of an optimizer step, on all ranks."""

_ACCUMULATION = "training.gradient_accumulation_steps"
_EVALUATED = ("data", "model", "packing", "preference")


def changed_settings(recipe: Recipe, checkpoint: Path | None, *, allow: bool) -> list[Change]:
    """The settings that act from here on.

    Raises:
        UserError: one that cannot act, or that has to be allowed.
    """
    if checkpoint is None:
        return []
    kept = manifest(checkpoint)
    state_of(checkpoint)  # what cannot be read is said before a model is loaded
    changes = [
        _settled_rows(_settled_start(change, kept.get("digests", {}).get(change.key)), recipe, kept.get("data", {}))
        for change in find_changes(kept.get("recipe", {}), recipe.model_dump(mode="json"))
    ]
    if kept.get(PACKS_PER_STEP) is not None:
        # which packs make a step, and how many were seen, its product with data ranks alone says
        changes = [replace(change, verdict="acts") if change.key == _ACCUMULATION else change for change in changes]
    check_changes(changes, allow=allow)
    return changes


def change_lines(changes: Iterable[Change], checkpoint: Path | None) -> list[str]:
    """What is said of them."""
    return [] if checkpoint is None else [f"changed since {checkpoint.name}: {change}" for change in changes]


def changed_steps(recipe: Recipe, checkpoint: Path | None, mesh: Mesh, *, allow: bool) -> list[Change]:
    """The packs of an optimizer step, where it holds others than before.

    Raises:
        UserError: it does, and that has to be allowed.
    """
    before = None if checkpoint is None else manifest(checkpoint).get(PACKS_PER_STEP)
    now = mesh.data_size * recipe.training.gradient_accumulation_steps
    changes = [] if before in (None, now) else [Change("packs of an optimizer step", before, now, "asks")]
    check_changes(changes, allow=allow)
    return changes


def _settled_start(change: Change, digest: str | None) -> Change:
    """A folder under another name is the same start where the weights in it are.

    Raises:
        UserError: they are others.
    """
    if change.key not in STARTS or digest is None or (now := digest_of(change.now)) is None:
        return change
    if now == digest:
        return replace(change, verdict="moved")
    raise UserError(
        f"{change} cannot act on a run that goes on: the weights there are others than those it was trained on; name "
        "the folder that holds these, or start another run in another training.output_dir"
    )


def _settled_rows(change: Change, recipe: Recipe, digests: Mapping[str, str]) -> Change:
    """Rows under another path or revision are the same data where their digest, or commit, is."""
    place, _, name = change.key.rpartition(".")
    if place not in digests or name not in ("path", "revision"):
        return change
    streams = recipe.data.streaming and place.startswith("data.train.")
    now = rows_digest(_sources(recipe)[place], recipe, streams=streams)
    return replace(change, verdict="moved") if now == digests[place] else change


def changed_data(recipe: Recipe, data: RecipeData, checkpoint: Path | None, *, allow: bool) -> list[Change]:
    """The sources that hold other rows than they did under the same path.

    Raises:
        UserError: there are some, and that has to be allowed.
    """
    if checkpoint is None:
        return []
    kept = manifest(checkpoint)
    changed = {change.key for change in find_changes(kept.get("recipe", {}), recipe.model_dump(mode="json"))}
    paths = {
        place: source.path
        for place, source in _sources(recipe).items()
        if changed.isdisjoint((f"{place}.path", place.rpartition(".")[0]))
    }
    changes = find_other_data(kept.get("data", {}), data.digests(recipe.data), paths)
    check_changes(changes, allow=allow)
    return changes


def _sources(recipe: Recipe) -> dict[str, Source]:
    """By ``data.train.0`` and the like."""
    parts = {"train": recipe.data.train, "eval": recipe.data.eval}
    return {f"data.{part}.{number}": source for part, group in parts.items() for number, source in enumerate(group)}


def evaluates_otherwise(changes: Iterable[Change]) -> bool:
    """Whether evaluations that were made before are of other held-out data than those from here on."""
    keys = [change.key for change in changes if change.verdict not in ("local", "moved")]
    return any(key.startswith("rows of ") or key.split(".")[0] in _EVALUATED for key in keys)


def place_of(checkpoint: Path, mesh: Mesh) -> Place:
    """Where a stream goes on.

    Raises:
        UserError: the checkpoint is of another number of ranks.
    """
    file = place_file(checkpoint, mesh)
    others = [] if file.exists() else sorted(checkpoint.glob("stream-*-of-*.npz"))
    if others:
        num_ranks = int(others[0].stem.rsplit("-", 1)[1])
        raise UserError(
            f"{checkpoint} keeps the places of {num_ranks} ranks in the stream of data, and this run has "
            f"{mesh.data_size}; resume with as many as began"
        )
    return Place.load(file)
