"""What a merged model was made of and by, kept in merge.json beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deltatune.runs.folder import mapping, read_run
from deltatune.training.adapter_files import adapter_digest
from deltatune.training.provenance import now, process_identity, versions
from deltatune.training.sealed import MANIFEST, steps_of

__all__ = ["MERGE_FILE", "merge_record"]

MERGE_FILE: Final = "merge.json"


def merge_record(adapter: Path, model: Mapping[str, Any], *, started: str, dtype: str, check: Any) -> dict[str, Any]:
    """The record, in the form of a leg of ``run.json``.

    - ``command``, ``folder``, ``host``, ``git``, ``deltatune``, ``started``, ``ended`` and ``versions``, as a leg has
    - ``adapter``: its folder, the SHA-256 of its weights, and the ``run`` that trained it (its folder, when it started,
      and how it ended), None where no record of one lies there, or around it if it is a checkpoint
    - ``model``: the base, as a run's record says it
    - ``dtype`` as it was asked for, and ``check``: how its logits were held against those of base and adapter

    Args:
        adapter: the adapter's folder.
        model: the base, by ``base_identity``.
        started: when the merge began.
        dtype: of the merged weights, as asked for.
        check: figures of the comparison.
    """
    return {
        **process_identity(),
        "started": started,
        "ended": now(),
        "adapter": {"path": str(adapter.resolve()), "sha256": adapter_digest(adapter), "run": _run_of(adapter)},
        "model": dict(model),
        "dtype": dtype,
        "check": check,
        "versions": versions(),
    }


def _run_of(adapter: Path) -> dict[str, Any] | None:
    place = adapter.resolve()
    is_checkpoint = place in steps_of(place.parent).values() and (place / MANIFEST).is_file()
    folders = (place, place.parent) if is_checkpoint else (place,)  # a checkpoint lies in the folder of its run
    folder = next((folder for folder in folders if (folder / "run.json").is_file()), None)
    if folder is None:
        return None
    run = read_run(folder)
    first = mapping(run.legs[0]) if run.legs else {}
    return {"folder": str(folder), "started": first.get("started"), "status": run.status}
