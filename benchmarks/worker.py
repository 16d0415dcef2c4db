"""The process of one system: builds it at each of its settings, checks it, times it, and writes a line for each.

``python -m benchmarks.worker SPEC RESULTS``: a JSON file of ``Spec``, and the file that lines of JSON go to. Whatever
``deltatune`` is on ``PYTHONPATH`` is timed; this uses its public names alone.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import torch

import deltatune
from benchmarks.checks import (
    Check,
    Seen,
    against_stock,
    against_truth,
    host_sync,
    leak_check,
    near_stock,
    observe,
    stock_checks,
    whole_graphs,
)
from benchmarks.shapes import adapters, build_model, shape_named
from benchmarks.systems import Packs, Setting, System, pinned
from benchmarks.timing import between_ms, mark, summary, synchronize

__all__ = ["Spec", "failures", "main", "outcome_of"]

_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Spec:
    """What a process does.

    Attributes:
        model: a name of ``benchmarks.shapes``.
        layers: its depth; None for the model's own.
        lengths: documents of a pack.
        settings: of one system, in order.
        known: the folder where the float32 reference and the stock path leave what they saw; None: no checks.
        timed: False for what runs for the sake of the checks alone.
        rank: of the adapters, scaled by ``2 * rank``.
        dtype: of weights and activations.
        device: where.
        backend: ``"inductor"``, ``"aot_eager"``, or ``"none"`` for no compile: of ours.
        warmup: steps before timing.
        steps: samples.
        profile: add the kernels of one step.
        seed: of weights, adapters and tokens.
    """

    model: str
    layers: int | None
    lengths: tuple[int, ...]
    settings: tuple[Setting, ...]
    known: str | None = None
    timed: bool = True
    rank: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"
    backend: str = "inductor"
    warmup: int = 3
    steps: int = 12
    profile: bool = False
    seed: int = 0

    def to_json(self) -> str:
        """As the process reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Spec:
        """The other way."""
        plain = json.loads(text)
        settings = tuple(Setting(**setting) for setting in plain.pop("settings"))
        return cls(**{**plain, "lengths": tuple(plain["lengths"]), "settings": settings})


def main(arguments: list[str]) -> int:
    """A line for each setting; one that fails costs the others nothing."""
    spec = Spec.of_json(Path(arguments[0]).read_text(encoding="utf-8"))
    with Path(arguments[1]).open("a", encoding="utf-8") as lines:
        for setting in spec.settings:
            found = setting.to_dict() | {"checks": []}
            try:
                _measure(spec, setting, found)
            except failures() as error:
                status, reason = outcome_of(error)
                found |= {"status": status, "reason": reason}
            lines.write(json.dumps(found, allow_nan=False) + "\n")
            lines.flush()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return 0


def _measure(spec: Spec, setting: Setting, found: dict[str, Any]) -> None:
    device = torch.device(spec.device)
    model = build_model(
        shape_named(spec.model), device, layers=spec.layers, dtype=getattr(torch, spec.dtype), seed=spec.seed
    )
    packs = Packs(spec.lengths, model.config.vocab_size, spec.seed)
    system = System(setting, model, rank=spec.rank, alpha=2 * spec.rank, backend=spec.backend, seed=spec.seed)
    del model
    if setting.system != "reference":
        system.step(packs.batch(0))
        found["first_step_seconds"] = system.first_step_seconds
    found["source"] = str(Path(deltatune.__file__).parent)
    found["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    checks = [] if spec.known is None else _checked(system, packs, Path(spec.known))
    found["checks"] = [check.to_dict() for check in checks]
    red = [check.name for check in checks if not check.ok]
    if red:
        found |= {"status": "red check", "reason": f"not timed: {', '.join(red)}"}
        return
    found |= {"status": "ok", "reason": None}
    if spec.timed:
        found |= _timed(spec, system, packs)
        after = [host_sync(system, packs), whole_graphs(system)] if system.prepared is not None else []
        found["checks"] += [check.to_dict() for check in after]
        found |= _compiler(system, after)
        if spec.profile and system.prepared is not None:
            found["kernels_of_a_step"] = _profile(system, packs)


def _checked(system: System, packs: Packs, known: Path) -> list[Check]:
    """The checks of a system; the reference and the stock path leave behind what they saw.

    What is known to leak is measured for the record and held to nothing.
    """
    setting = system.setting
    if setting.system == "stock as shipped":
        return []
    path = {name: known / f"{name} {setting.truth}.pt" for name in ("reference", "stock")}
    if setting.system == "reference":
        _keep(observe(system, packs), path["reference"])
        return []
    true = _kept(path["reference"])
    seen = observe(system, packs)
    if setting.system == "stock":
        checks = [leak_check(system), *stock_checks(setting.name, seen, true)]
        if all(check.ok for check in checks):
            _keep(seen, path["stock"])
        return checks
    stock = _kept(path["stock"])
    if setting.base == "fp8-products":
        return [*near_stock(setting.name, seen, stock), leak_check(system)]
    checks = against_truth(setting.name, seen, stock, true)
    return [*checks, against_stock(setting.name, seen, stock, true), leak_check(system)]


def _keep(seen: Seen, path: Path) -> None:
    torch.save(vars(seen), path)


def _kept(path: Path) -> Seen:
    if not path.is_file():
        raise ValueError(f"nothing to hold it to: {path.stem} was not measured, or failed its own checks")
    return Seen(**torch.load(path, weights_only=True))


def _timed(spec: Spec, system: System, packs: Packs) -> dict[str, Any]:
    """A sample is the time between the ends of two steps, as in training: what the host cannot hide counts."""
    cuda = system.device.type == "cuda"
    batches = packs.batches()
    for batch in islice(batches, max(0, spec.warmup - 1)):
        system.step(batch)
    taken = [pinned(batch) if cuda else batch for batch in islice(batches, spec.steps + 1)]
    synchronize(system.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for batch in taken:
        system.step(batch)
        marks.append(mark(system.device))
    synchronize(system.device)
    times = summary(between_ms(*pair) for pair in pairwise(marks))
    return {
        **times,
        "tokens_per_second": sum(spec.lengths) / (times["median_ms"] / 1e3),
        # weights, adapters, optimizer and activations: all that the process holds
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "trainable_parameters": sum(p.numel() for _, p in adapters(system.model)),
    }


def _compiler(system: System, after: list[Check]) -> dict[str, Any]:
    if system.prepared is None:
        return {}
    report, compiled = system.prepared.report, system.prepared.compile_report
    choice = system.prepared.auto_checkpointing
    return {
        "checkpointing_taken": choice.setting if choice else system.setting.checkpointing,
        "predicted_bytes": choice.predicted_bytes if choice else None,
        "kernels": {row.op: row.impl for row in report.kernels},
        "lora_layers": report.to_dict().get("lora_layers"),
        "compile_seconds": compiled.seconds if compiled else None,
        "graphs": dict(compiled.graphs) if compiled else None,
        "breaks": len(compiled.breaks) if compiled else None,
        "recompiles": len(compiled.recompiles) if compiled else None,
        "host_syncs": int(not after[0].ok) if system.device.type == "cuda" else None,
    }


def _profile(system: System, packs: Packs) -> list[dict[str, Any]]:
    """Ms and launches of every kernel of a step, the longest first; of operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    cuda = system.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        system.step(packs.batch(1))
        synchronize(system.device)
    rows = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us and ("CUDA" in str(event.device_type)) == cuda:
            rows.append({"kernel": event.key, "ms": us / 1e3, "launches": event.count})
    return sorted(rows, key=lambda row: -row["ms"])


def failures() -> tuple[type[Exception], ...]:
    """What a system may fail with and leave the others their figures; an interrupt is none of them."""
    known = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, OSError)
    triton = sys.modules.get("triton")
    return known if triton is None else (*known, triton.errors.TritonError)


def outcome_of(error: Exception) -> tuple[str, str]:
    """``(status, reason)`` of a record's result, in which no file has a path of the machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out_of_memory", str(error).splitlines()[0]
    status = "unavailable" if isinstance(error, ValueError | ImportError) else "failed"
    message = f"{type(error).__name__}: {error}".replace(f"{_ROOT}/", "")
    return status, " ".join(message.split())[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
