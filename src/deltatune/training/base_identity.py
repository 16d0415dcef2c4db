"""Which model a run began with, and whether another one is the same."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, user_path
from deltatune.hf.model import base_model
from deltatune.runs.folder import mapping, read_run
from deltatune.subclass import stock_class
from deltatune.training.checkpoint import commit_of, origin_of
from deltatune.training.sealed import manifest
from deltatune.training.weights_digest import STARTS, digest_of

__all__ = ["base_identity", "check_base"]


def base_identity(section: ModelSection, model: nn.Module) -> dict[str, str | None]:
    """Which model it is: ``name_or_path``, ``revision`` as asked, the Hub's ``commit``, its ``class`` and a ``digest``.

    The path of a folder is absolute. ``commit`` is None where no Hub says it, and ``digest``, of the weights and the
    configuration, for a name on the Hub.
    """
    base = base_model(model)
    return {
        "name_or_path": str(origin_of(section, section.name_or_path)["pretrained_model_name_or_path"]),
        "revision": section.revision,
        "commit": commit_of(section),
        "class": stock_class(base).__name__,
        "digest": digest_of(section.name_or_path),
    }


def check_base(folder: Path, section: ModelSection, *, trained_on: str | None, allow_other: bool) -> list[str]:
    """Holds the base model of an adapter against the one that its records say it was trained on.

    Args:
        folder: the adapter's.
        section: the base model that is there now.
        trained_on: what the adapter's own configuration calls it.
        allow_other: go on with another one.

    Returns:
        What should be said of it.

    Raises:
        UserError: its weights or its configuration are others, by their digests.
    """
    name, before, now = section.name_or_path, _recorded_digest(folder), digest_of(section.name_or_path)
    if before is None or now is None:
        same = trained_on is not None and _place(name) == _place(trained_on)
        return [] if same else [f"no record of {folder} tells whether it was trained on {name}: by its shapes it fits"]
    if before == now:
        return [f"{name} is the base model that it was trained on, by the digest of its weights"]
    said = f"{name} holds other weights, or another config.json, than the base model that {folder} was trained on"
    if not allow_other:
        raise UserError(
            f"{said} (digest {now[:12]}, where its record says {before[:12]}); name that one with --base, or say "
            "--allow-other-base"
        )
    return [said]


def _place(name: str) -> str:
    path = user_path(name)
    return str(path.resolve()) if path.exists() else name


def _recorded_digest(folder: Path) -> str | None:
    """Of the base, as the manifest of a checkpoint or the record of a run beside an adapter has it."""
    try:
        found = mapping(manifest(folder).get("digests")).get(STARTS[0])
    except (OSError, ValueError):
        found = None
    if found is None and (folder / "run.json").is_file():
        found = mapping(read_run(folder).record.get("model")).get("digest")
    return found if isinstance(found, str) else None
