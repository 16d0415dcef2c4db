"""What is another than at the checkpoint that a run goes on from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deltatune.config.schema import Recipe
from deltatune.data.stream import Place
from deltatune.errors import UserError
from deltatune.training.batches import place_file
from deltatune.training.changes import Change, check_changes, find_changes, find_other_data
from deltatune.training.mesh import Mesh
from deltatune.training.packs import RecipeData
from deltatune.training.sealed import manifest

__all__ = ["changed_data", "changed_settings", "evaluates_otherwise", "place_of"]

_EVALUATED = ("data", "model", "packing", "preference")
_READ_ALIKE = ("data.cache_dir", "data.num_proc")


def changed_settings(recipe: Recipe, checkpoint: Path | None, *, allow: bool) -> list[Change]:
    """The settings that act from here on.

    Raises:
        UserError: one that cannot act, or that has to be allowed.
    """
    if checkpoint is None:
        return []
    changes = find_changes(manifest(checkpoint).get("recipe", {}), recipe.model_dump(mode="json"))
    check_changes(changes, allow=allow)
    return changes


def changed_data(data: RecipeData, checkpoint: Path | None, *, allow: bool) -> list[Change]:
    """The sources that hold other rows.

    Raises:
        UserError: there are some, and that has to be allowed.
    """
    if checkpoint is None:
        return []
    changes = find_other_data(manifest(checkpoint).get("data", {}), data.identities())
    check_changes(changes, allow=allow)
    return changes


def evaluates_otherwise(changes: Iterable[Change]) -> bool:
    """Whether evaluations that were made before are of other held-out data than those from here on."""
    keys = [change.key for change in changes]
    return any(
        key.startswith("rows of ") or (key.split(".")[0] in _EVALUATED and key not in _READ_ALIKE) for key in keys
    )


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
