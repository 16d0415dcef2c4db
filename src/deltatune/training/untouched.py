"""Whether a folder holds all that a finished run leaves, so that the run need not write any of it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from deltatune.training.beginning import MARKERS
from deltatune.training.export import CARD_FILE
from deltatune.training.finishing import METRICS_FILE, REPORT_FILE
from deltatune.training.record import is_finished

__all__ = ["final_metrics", "read_metrics"]

_FILES: Final = (REPORT_FILE, CARD_FILE, "tokenizer_config.json")


def final_metrics(output_dir: Path, *, recipe: str, step: int, adapter: bool) -> dict[str, Any] | None:
    """``metrics.json`` of a run that finished, if its files are there and have all of their bytes; else None.

    Args:
        output_dir: the run's folder.
        recipe: as ``config.yaml`` holds it.
        step: the last one of the run.
        adapter: whether the run saves an adapter, or a whole model.
    """
    metrics = read_metrics(output_dir)
    names = (*_FILES, MARKERS[0] if adapter else MARKERS[1])
    try:
        there = (output_dir / "config.yaml").read_text(encoding="utf-8") == recipe
        there = there and all((output_dir / name).is_file() for name in names)
        for file in _weights(output_dir, adapter=adapter) if there else ():
            with safe_open(file, "pt"):  # which holds its size against its header
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return metrics if there and metrics.get("global_step") == step and is_finished(output_dir) else None


def read_metrics(output_dir: Path) -> dict[str, Any]:
    """``metrics.json`` of a folder; empty where none can be read."""
    try:
        found = json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _weights(output_dir: Path, *, adapter: bool) -> Iterator[Path]:
    index = output_dir / "model.safetensors.index.json"
    if adapter:
        yield output_dir / "adapter_model.safetensors"
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        yield from (output_dir / name for name in sorted(names))
    else:
        yield output_dir / "model.safetensors"
