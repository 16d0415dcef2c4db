"""Figures out of records of any layout: the results of training steps and of ops, one flat list of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.records import OURS, UNCHECKED, Record
from benchmarks.roofline import Part, Step, roofline
from benchmarks.shapes import SHAPES

__all__ = ["GIB", "OpCase", "Steps", "newest_full", "newest_ops", "of_bound", "op_cases", "roofline_of", "steps_of"]

GIB: Final = 2**30
TRAINED: Final = ("train", "frontier")


@dataclass(frozen=True)
class Steps:
    """The training steps of one configuration of a record.

    Attributes:
        record: where it is from.
        config: what was asked.
        results: of the systems that were timed; a red check leaves none.
        ceilings: rates measured in the same run.
    """

    record: Record
    config: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    ceilings: Mapping[str, Any] | None

    @property
    def full(self) -> bool:
        """Whether the model had all of its layers."""
        return bool(self.config["layers"] == self.config["full_layers"])

    def find(self, system: str, checkpointing: object = None, targets: str | None = "qkvo") -> list[Mapping[str, Any]]:
        """Results of a system; None finds every setting. Ours with its default adapters, warm starts alone."""
        return [
            r
            for r in self.results
            if r["system"] == system
            and (checkpointing is None or r["checkpointing"] == checkpointing)
            and (targets is None or r["targets"] == targets)
            and (not system.startswith(OURS) or r["lora"] == "auto")
            and not _is_cold_start(r)
        ]

    @property
    def checked(self) -> bool:
        """Whether its systems were held to float32 or to the stock path, in the same run, before they were timed."""
        return UNCHECKED not in str(self.record.data.get("method"))

    def over_16_bits(self, base: str, targets: str = "all") -> list[tuple[Mapping[str, Any], float]]:
        """Results of ours on a base in few bits, and the ms of each over those of ours on 16 bits beside it."""
        return [
            (r, r["median_ms"] / plain["median_ms"])
            for r in self.find(f"{OURS} {base}", targets=targets)
            for plain in self.find(OURS, r["checkpointing"], targets)
        ]

    def cold_starts(self, state: str) -> list[Mapping[str, Any]]:
        """Results of new processes with the compiler's cache ``"cold"`` or ``"warm"``."""
        return [r for r in self.results if state in (r.get("caches"), str(r.get("label")).removeprefix("caches "))]


def _is_cold_start(result: Mapping[str, Any]) -> bool:
    return "caches" in result or str(result.get("label", "")).startswith("caches")


def steps_of(records: Sequence[Record]) -> Iterator[Steps]:
    """Every configuration of the complete records of training steps, in their order."""
    for record in records:
        if record.kind not in TRAINED or not record.complete:
            continue
        for config in record.configs:
            timed = [r for r in config["results"] if r["status"] == "ok" and "median_ms" in r]
            yield Steps(record, config["config"], timed, config.get("ceilings"))


def newest_full(records: Sequence[Record], model: str, device: str, tokens: int = 16384) -> list[Steps]:
    """Full depth, packs of so many tokens, several documents; the newest first."""
    return [
        steps
        for steps in steps_of(records)
        if steps.record.subject == model
        and device in steps.record.device
        and steps.full
        and steps.config["tokens"] == tokens
    ]


def roofline_of(steps: Steps, targets: str) -> list[Part] | None:
    """The parts of a step's bound, from the record's own shapes and ceilings."""
    rates, shape = steps.ceilings, SHAPES.get(steps.config["model"])
    if not rates or shape is None:
        return None
    step = Step(shape.values, steps.config["layers"], steps.config["lengths"], targets, steps.config["lora_rank"])
    return roofline(
        step, flops_per_second=rates["gemm_flops_per_second"], bytes_per_second=rates["copy_bytes_per_second"]
    )


@dataclass(frozen=True)
class OpCase:
    """One shape of a record of an op."""

    record: Record
    config: Mapping[str, Any]
    data: Mapping[str, Any]

    def results(self, what: str) -> list[Mapping[str, Any]]:
        """Those of a direction that were timed, red checks of libraries among them."""
        return [r for r in self.data["results"] if r["what"] == what and r.get("median_ms") is not None]

    def auto(self, what: str) -> Mapping[str, Any] | None:
        """What ``auto`` takes."""
        return next((r for r in self.results(what) if r["impl"] == self.data.get("auto")), None)


def op_cases(records: Sequence[Record], op: str) -> Iterator[OpCase]:
    """Every shape of an op's records, in their order; a record without a choice of ``auto`` has none to show."""
    for record in records:
        if record.kind == f"ops/{op}":
            for data in record.configs:
                if "auto" in data:
                    yield OpCase(record, data["config"], data)


def newest_ops(records: Sequence[Record], op: str) -> list[OpCase]:
    """The newest of each shape."""
    found: dict[tuple[object, ...], OpCase] = {}
    for case in op_cases(records, op):
        sizes = tuple(sorted((k, v) for k, v in case.config.items() if isinstance(v, int) and k not in _NO_SIZE))
        found.setdefault((case.record.device, *sizes), case)
    return list(found.values())


def of_bound(result: Mapping[str, Any]) -> float:
    """The bound of an op over its time; records of schema 1 say floor."""
    return float(result["of_bound"] if "of_bound" in result else result["of_floor"])


_NO_SIZE: Final = ("gate_tokens", "documents")
