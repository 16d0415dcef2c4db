"""The memory frontier as a picture: tokens a second against peak memory, a point for each setting."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from deltatune.bench.records import Record

__all__ = ["Frontier", "Point", "draw", "file_of", "frontier_of", "is_drawn_from"]

_GIB: Final = 2**30
_OURS: Final = "deltatune"
_DIGEST: Final = re.compile(r"data ([0-9a-f]{64})")


@dataclass(frozen=True)
class Point:
    """One setting."""

    label: str
    gib: float
    tokens_per_second: float


@dataclass(frozen=True)
class Frontier:
    """What is drawn.

    Attributes:
        title: of the picture.
        lines: system -> its points, by memory; ours first.
        floor: tokens a second that the arithmetic floor allows; None where it was not measured.
    """

    title: str
    lines: Mapping[str, tuple[Point, ...]]
    floor: float | None

    @property
    def digest(self) -> str:
        """Of everything that is drawn: the picture carries it, so that a stale one can be told without drawing."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def frontier_of(record: Record) -> Frontier | None:
    """The frontier of a record's first config; None where fewer than two settings of ours have a peak.

    Adapters on q/k/v/o alone, so that all points are the same step.
    """
    if record.kind not in ("frontier", "train") or not record.configs:
        return None
    config = record.configs[0]
    lines: dict[str, list[Point]] = {_OURS: []}
    for result in config["results"]:
        if result["status"] == "ok" and result.get("peak_bytes") and result["targets"] == "qkvo":
            name = (
                result["system"] if result["system"] != _OURS or result["lora"] == "stock" else f"{_OURS}, fused LoRA"
            )
            point = Point(str(result["checkpointing"]), result["peak_bytes"] / _GIB, result["tokens_per_second"])
            lines.setdefault(name, []).append(point)
    ours = sum(len(points) for name, points in lines.items() if name.startswith(_OURS))
    if record.kind != "frontier" or ours < 2:
        return None
    about, floor = config["config"], config.get("floor")
    return Frontier(
        f"{record.subject} on {record.device}, {about['layers']} layers, packs of {about['tokens']} tokens",
        {name: tuple(sorted(points, key=lambda p: p.gib)) for name, points in lines.items() if points},
        about["tokens"] / (floor["total_ms"] / 1e3) if floor else None,
    )


def file_of(record: Record) -> str | None:
    """Where the picture of a record lies, relative to the documentation; None for a record without one."""
    if frontier_of(record) is None:
        return None
    device = re.sub(r"[^a-z0-9]+", "-", record.device.lower().removeprefix("nvidia ")).strip("-")
    return f"plots/frontier-{record.subject}-{device}.svg"


def is_drawn_from(path: Path, record: Record) -> bool:
    """Whether a picture shows what the record holds."""
    frontier = frontier_of(record)
    if frontier is None or not path.is_file():
        return False
    found = _DIGEST.search(path.read_text(encoding="utf-8"))
    return found is not None and found[1] == frontier.digest


def draw(record: Record, path: Path) -> None:
    """Writes the picture as SVG, the same bytes for the same record and version of matplotlib.

    Raises:
        ModuleNotFoundError: without matplotlib, which the extra ``bench`` brings.
        ValueError: a record without a frontier.
    """
    frontier = frontier_of(record)
    if frontier is None:
        raise ValueError(f"{record.path} holds no frontier")
    matplotlib: Any = importlib.import_module("matplotlib")
    figure_type: Any = importlib.import_module("matplotlib.figure").Figure
    # text as text, and ids that do not change from run to run
    with matplotlib.rc_context({"svg.hashsalt": "deltatune", "svg.fonttype": "none", "font.size": 10}):
        figure = figure_type(figsize=(7.2, 4.4), layout="constrained")
        _fill(figure.add_subplot(), frontier)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"made by deltatune bench report; data {frontier.digest}"}
        figure.savefig(path, format="svg", metadata=about)


def _fill(axes: Any, frontier: Frontier) -> None:
    for index, (name, points) in enumerate(frontier.lines.items()):
        ours = name.startswith(_OURS)
        xs, ys = [p.gib for p in points], [p.tokens_per_second for p in points]
        axes.plot(xs, ys, marker="o" if ours else "s", linestyle="-" if ours else "--", label=name, color=f"C{index}")
        for point in points:
            at = (point.gib, point.tokens_per_second)
            axes.annotate(point.label, at, xytext=(5, -11), textcoords="offset points", fontsize=8)
    if frontier.floor is not None:
        axes.axhline(frontier.floor, color="grey", linewidth=0.8, linestyle=":", label="arithmetic floor")
    axes.set(xlabel="peak memory, GiB", ylabel="tokens a second", title=frontier.title)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
