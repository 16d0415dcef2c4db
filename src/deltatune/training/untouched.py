"""Whether a folder holds all that a finished run leaves, so that the run need not write any of it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from deltatune.config.load import parse_recipe
from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.training.beginning import MARKERS
from deltatune.training.changes import find_changes
from deltatune.training.export import CARD_FILE
from deltatune.training.finishing import METRICS_FILE, REPORT_FILE
from deltatune.training.record import is_finished

__all__ = ["final_metrics", "read_metrics"]

_FILES: Final = (REPORT_FILE, CARD_FILE, "tokenizer_config.json")


def final_metrics(output_dir: Path, *, recipe: Recipe, step: int) -> dict[str, Any] | None:
    """``metrics.json`` of a run that finished, if its files are there and have all of their bytes; else None.

    Args:
        output_dir: the run's folder.
        recipe: what ``config.yaml`` holds, up to settings that are local.
        step: the last one of the run.
    """
    metrics = read_metrics(output_dir)
    adapter = recipe.lora is not None
    names = (*_FILES, MARKERS[0] if adapter else MARKERS[1])
    try:
        there = _is_under(recipe, output_dir / "config.yaml")
        there = there and all((output_dir / name).is_file() for name in names)
        for file in _weights(output_dir, adapter=adapter) if there else ():
            with safe_open(file, "pt"):  # which holds its size against its header
                pass
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return metrics if there and metrics.get("global_step") == step and is_finished(output_dir) else None


def read_metrics(output_dir: Path) -> dict[str, Any]:
    """``metrics.json`` of a folder; empty where none can be read."""
    try:
        found = json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_under(recipe: Recipe, file: Path) -> bool:
    """Whether the last leg, whose recipe a file holds, was the same run."""
    before = parse_recipe(file.read_text(encoding="utf-8"), str(file)).recipe
    found = find_changes(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    return all(change.verdict == "local" for change in found)


def _weights(output_dir: Path, *, adapter: bool) -> Iterator[Path]:
    index = output_dir / "model.safetensors.index.json"
    if adapter:
        yield output_dir / "adapter_model.safetensors"
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        yield from (output_dir / name for name in sorted(names))
    else:
        yield output_dir / "model.safetensors"
