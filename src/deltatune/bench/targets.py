"""``deltatune bench targets``: what the kernels and the training step must reach, and whether the records show it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltatune.bench import target_figures as figures
from deltatune.bench.records import RECORDS, Record, load_records
from deltatune.bench.target_figures import Figure
from deltatune.report import table

__all__ = ["TARGETS", "Outcome", "Target", "add_arguments", "evaluate", "run"]

DEVICE: Final = "H200"
_TRAINED: Final = ("qwen3.5-2b", "qwen3.5-9b")
_FRONTIER: Final = ("frontier",)
# a frontier holds the same results as a training record, for more settings of ours
_STEPS: Final = ("train", *_FRONTIER)


@dataclass(frozen=True)
class Target:
    """One thing to reach.

    Attributes:
        name: what it is about.
        kinds: of the records that can show it.
        subject: the model or the op of those records.
        figure: a record -> the figure; None where the record does not hold it.
        limit: what the figure is held to.
        at_least: whether the limit is the least or the most.
        form: how figure and limit are printed.
    """

    name: str
    kinds: tuple[str, ...]
    subject: str
    figure: Callable[[Record], Figure | None]
    limit: float
    at_least: bool = True
    form: str = "{:.1%}"

    @property
    def wanted(self) -> str:
        """The limit in words."""
        return f"{'>=' if self.at_least else '<='} {self.form.format(self.limit)}"

    def met(self, figure: Figure) -> bool:
        """Whether a figure reaches the limit; a figure without green gates reaches nothing."""
        reached = figure.value >= self.limit if self.at_least else figure.value <= self.limit
        return reached and figure.green


@dataclass(frozen=True)
class Outcome:
    """A target beside the newest record that can show it: both None where there is none."""

    target: Target
    figure: Figure | None
    record: Record | None

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"no record"``."""
        if self.figure is None:
            return "no record"
        return "met" if self.target.met(self.figure) else "missed"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Of the printed table."""
        if self.figure is None or self.record is None:
            return self.target.name, self.target.wanted, "-", self.verdict, "-"
        note = "red gate" if not self.figure.green else self.figure.note
        found = self.target.form.format(self.figure.value) + (f" ({note})" if note else "")
        return self.target.name, self.target.wanted, found, self.verdict, self.record.path.name


def _training(model: str) -> Iterator[Target]:
    """The table of training targets, and what else a training record shows."""
    large = model == "qwen3.5-9b"
    floor, same_memory, free, shipped = (0.85, 1.4, 1.9, 2.2) if large else (0.80, 1.6, 2.2, 2.6)
    ratio = "{:.3f}x"
    for name, figure, limit, form in (
        ("of the arithmetic floor", figures.of_floor, floor, "{:.2%}"),
        ("against leak-free stock with layer checkpointing, no more memory", figures.same_memory, same_memory, ratio),
        ("against the same, memory free", figures.memory_free, free, ratio),
        ("against stock as shipped with layer checkpointing, memory free", figures.as_shipped, shipped, ratio),
    ):
        yield Target(f"{model}: {name}", _STEPS, model, figure, limit, form=form)
    for name, figure, limit, form in (
        ("LoRA on all linears against q/k/v/o, same checkpointing", figures.all_linears, 1.10, ratio),
        ("host syncs in a step", figures.host_syncs, 0, "{:.0f}"),
        ("graphs of a layer type", figures.graphs, 1, "{:.0f}"),
        ("graph breaks and recompiles", figures.breaks, 0, "{:.0f}"),
    ):
        yield Target(f"{model}: {name}", _STEPS, model, figure, limit, at_least=False, form=form)
    yield Target(f"{model}: points of the memory frontier", _FRONTIER, model, figures.points, 6, form="{:.0f}")
    yield Target(
        f"{model}: checkpointing auto, error of the predicted peak",
        _FRONTIER,
        model,
        figures.prediction,
        0.10,
        at_least=False,
    )
    yield Target(
        f"{model}: checkpointing auto, speed against the fastest setting that fits",
        _FRONTIER,
        model,
        figures.auto_choice,
        0.98,
    )


def _cold_starts() -> Iterator[Target]:
    for model in ("qwen3.5-2b", "qwen3.5-27b"):
        for name, figure, limit in (
            ("first step, library caches warm", figures.first_step, 40.0),
            ("first step of a second run", figures.second_run, 15.0),
        ):
            yield Target(f"{model}: {name}", _STEPS, model, figure, limit, at_least=False, form="{:.1f} s")


def _ops() -> Iterator[Target]:
    directions = ("forward", "forward+backward")
    for width in (6144, 8192):
        for what, limit in zip(directions, (0.80, 0.70), strict=True):
            figure = figures.of_copy(what, {"D": width}, tokens=(16384,))
            name = f"causal_conv [1, 16384, {width}], {what}, of copy bandwidth"
            yield Target(name, ("ops/causal_conv",), "causal_conv", figure, limit)
    for query_heads, key_heads, dim in ((40, 8, 128), (16, 4, 256)):
        for what, limit in zip(directions, (0.85, 0.75), strict=True):
            sizes = {"N": query_heads, "M": key_heads, "D": dim}
            figure = figures.of_copy(what, sizes, tokens=(8192, 16384, 32768))
            name = f"rms_norm_rope {query_heads}/{key_heads} x {dim}, 8k to 32k, {what}, of copy bandwidth"
            yield Target(name, ("ops/rms_norm_rope",), "rms_norm_rope", figure, limit)
    for width in (2048, 4096):
        for what, figure, limit in (
            ("peak of the default over the lowest", figures.loss_memory(width), 1.05),
            ("time of the default over the fastest within 5% of that", figures.loss_time(width), 1.0),
        ):
            name = f"linear_cross_entropy 16384 x {width} x 248320, {what}"
            op = "linear_cross_entropy"
            yield Target(name, (f"ops/{op}",), op, figure, limit, at_least=False, form="{:.3f}x")


TARGETS: Final[tuple[Target, ...]] = (*(t for model in _TRAINED for t in _training(model)), *_cold_starts(), *_ops())
"""All of them, for one H200 and packs of 16384 tokens unless the name says otherwise."""


def evaluate(targets: Sequence[Target], records: Sequence[Record]) -> list[Outcome]:
    """Each target with the newest record that holds its figure; ``records`` the newest first."""
    return [_outcome(target, records) for target in targets]


def _outcome(target: Target, records: Sequence[Record]) -> Outcome:
    for record in records:
        if record.kind in target.kinds and record.subject == target.subject:
            figure = target.figure(record)
            if figure is not None:
                return Outcome(target, figure, record)
    return Outcome(target, None, None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``deltatune bench targets``."""
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help=f"{RECORDS} by default")
    parser.add_argument("--device", default=DEVICE, help=f"part of the device's name; {DEVICE} by default")


def run(args: argparse.Namespace) -> int:
    """Prints every target with its figure and record; 1 while one is missed or has no record."""
    records = [record for record in load_records(args.records) if args.device in record.device]
    outcomes = evaluate(TARGETS, records)
    header = ("target", "wanted", "figure", "", "record")
    sys.stdout.write("\n".join(table(header, [outcome.cells for outcome in outcomes])) + "\n")
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("met", "missed", "no record")}
    sys.stdout.write(f"\n{', '.join(f'{count} {verdict}' for verdict, count in counts.items())}\n")
    return 0 if counts["met"] == len(outcomes) else 1
