"""Figures out of records of several GPUs: the rate of a GPU among others, over that of one by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.records import Record

__all__ = ["Scaling", "cold_ratios", "scalings", "several"]


@dataclass(frozen=True)
class Scaling:
    """A result on several GPUs, and the same on one where that was timed.

    Attributes:
        record: where it is from.
        config: what was asked.
        result: on several GPUs; a red check leaves none.
        one: on one GPU in the same record.
    """

    record: Record
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    one: Mapping[str, Any] | None

    @property
    def ratio(self) -> float | None:
        """Tokens a second of each GPU over those of one alone; None where it was not timed."""
        if self.one is None:
            return None
        rate: float = self.result["tokens_per_second_per_gpu"]
        return rate / float(self.one["tokens_per_second_per_gpu"])

    @property
    def note(self) -> str:
        """What is not as the name of a figure says."""
        about, one = self.config, self.one or {}
        depth = f"{about['layers']} of {about['full_layers']} layers" if about["layers"] != about["full_layers"] else ""
        halved = f"one GPU with {one['one_gpu_tokens']} tokens" if "one_gpu_tokens" in one else ""
        return ", ".join(filter(None, (depth, halved)))


def several(records: Sequence[Record]) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """Every configuration of the complete records of several GPUs, in their order."""
    for record in records:
        if record.kind == "parallel" and record.complete:
            yield from ((record, config) for config in record.configs)


def scalings(records: Sequence[Record], **wanted: Any) -> Iterator[Scaling]:
    """What was timed on several GPUs; ``wanted``: ``model``, or ``system``, ``tokens`` and ``gpus`` of the result."""
    for record, found in several(records):
        about, results = found["config"], [r for r in found["results"] if r.get("median_ms") and r["status"] == "ok"]
        for result in results:
            pair = (result["system"], result["tokens"])
            one = next((r for r in results if (r["system"], r["tokens"]) == pair and r["gpus"] == 1), None)
            asked = all({**result, "model": about["model"]}[key] == value for key, value in wanted.items())
            if result["gpus"] > 1 and asked:
                yield Scaling(record, about, result, one)


def cold_ratios(records: Sequence[Record], model: str, gpus: int) -> Iterator[tuple[Record, float]]:
    """Seconds to the first step with empty caches on so many GPUs over those on one."""
    for record, found in several(records):
        cold = [r for r in found["results"] if r.get("label") == "cold" and r["status"] == "ok"]
        seconds = {r["gpus"]: float(r["since_start_seconds"]) for r in cold}
        if found["config"]["model"] == model and {1, gpus} <= seconds.keys():
            yield record, seconds[gpus] / seconds[1]
