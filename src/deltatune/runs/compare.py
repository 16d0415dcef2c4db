"""Recipes side by side, and the figures that runs came to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deltatune.runs import words
from deltatune.runs.folder import RunFolder, mapping, number

__all__ = ["differences", "status", "summary"]

_OWN_FOLDER = "training.output_dir"  # says nothing about how runs differ


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a key and what each recipe says of it, for keys of which they say different things."""
    flat = [dict(_flat(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values if key != _OWN_FOLDER)
    rows = [(key, *(values.get(key, words.UNKNOWN) for values in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def summary(runs: Sequence[RunFolder]) -> list[tuple[str, ...]]:
    """Rows of a name and what it is for each run."""
    rows: dict[str, Callable[[RunFolder], str]] = {
        "status": status,
        "base model": lambda run: words.text(mapping(run.record.get("model")).get("name_or_path")),
        "trained": _trained,
        "steps": lambda run: words.count(_last(run, "to_step")),
        "loss": lambda run: _ends(run.series("loss")),
        "held-out loss": lambda run: _ends(run.series("eval_loss")),
        "best held-out loss": _best,
        "tokens": lambda run: words.count(_total(run, "tokens")),
        "trained tokens": lambda run: words.count(_total(run, "trained_tokens")),
        "training took": lambda run: words.duration(_total(run, "seconds")),
        "tokens per second": lambda run: words.count(_middle(run.series("tokens_per_second"))),
        "peak memory": lambda run: _peak(run.series("peak_memory_gib")),
        "device": lambda run: words.text(_last(run, "device")),
        "started": lambda run: words.moment(run.legs[0].get("started") if run.legs else None),
    }
    return [(name, *(value(run) for run in runs)) for name, value in rows.items()]


def status(run: RunFolder) -> str:
    """In words; of a run that goes on, when it was last heard of, since a killed one cannot say so."""
    if run.status != "running":
        return run.status
    return f"running, last heard of {words.duration(max(time.time() - run.written, 0))} ago"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _flat(item, f"{key}.{place}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _trained(run: RunFolder) -> str:
    prepared = mapping(run.report.get("prepare"))
    rank = mapping(run.recipe.get("lora")).get("r")
    what = f"LoRA of rank {rank}" if rank else "every weight" if run.recipe else words.UNKNOWN
    elements = number(prepared.get("trainable_parameters"))
    return what if elements is None else f"{what}, {elements:,.0f} parameters"


def _last(run: RunFolder, name: str) -> Any:
    return run.legs[-1].get(name) if run.legs else None


def _total(run: RunFolder, name: str) -> float | None:
    found = [value for leg in run.legs if (value := number(leg.get(name))) is not None]
    return sum(found) if found else None


def _ends(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return words.UNKNOWN
    return f"{points[0][1]:.4f} → {points[-1][1]:.4f}" if len(points) > 1 else f"{points[0][1]:.4f}"


def _best(run: RunFolder) -> str:
    points = [(value, step) for step, value in run.series("eval_loss") if value == value]
    return "{:.4f} at step {}".format(*min(points)) if points else words.UNKNOWN


def _middle(points: Sequence[tuple[int, float]]) -> float | None:
    """The median: the first steps compile."""
    found = sorted(value for _, value in points if value == value)
    return found[len(found) // 2] if found else None


def _peak(points: Sequence[tuple[int, float]]) -> str:
    found = [value for _, value in points if value == value]
    return words.memory(max(found) * 2**30) if found else words.UNKNOWN
