"""Systems in processes of their own, one after the other or in turns, and what they found as one record.

A line for each setting is kept as it comes: a process that dies costs its own setting alone, and what has been
measured when time is up, or at an interrupt, makes the record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import deltatune
from benchmarks.baselines import LEAK_FREE
from benchmarks.records import OURS, UNCHECKED, head, source_of, write_record
from benchmarks.roofline import Step, roofline
from benchmarks.shapes import shape_named
from benchmarks.systems import Setting
from benchmarks.timing import summary
from benchmarks.worker import Spec

__all__ = ["METHOD", "Job", "Session", "merged"]

METHOD: Final = (
    "a sample is the time between the ends of two training steps, by CUDA events (the wall clock on a CPU): the batch "
    "to the device, forward, loss, backward, AdamW(fused=True) with learning rate 0, gradients set to None; each "
    "system in a process of its own, those of several rounds in turns; the first step of a turn dropped, every step a "
    "pack of its own with the same lengths in another order; peak_bytes is all that the process holds at its peak"
)
CHECKED: Final = (
    "; timed after its checks: token losses, document losses and adapter gradients against float32 document by "
    "document, gradients of the pack against the leak-free stock path, verify"
)
_ROOT: Final = Path(__file__).parents[1]
_POLL_SECONDS: Final = 0.2
#: What a record says of the model's shapes: what the roofline reads.
_SHAPES: Final = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "vocab_size",
    "num_experts", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A process.

    Attributes:
        settings: of one system, in order.
        label: of its results, next to the name; empty for none.
        path: the folder that holds the ``deltatune`` to time; None for the one that runs this.
        rounds: turns of it.
        checked: hold it to the reference and the stock path first.
        timed: False for what runs for the sake of the checks alone.
        environment: in addition to the usual one.
    """

    settings: tuple[Setting, ...]
    label: str = ""
    path: Path | None = None
    rounds: int = 1
    checked: bool = True
    timed: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


class Session:
    """One configuration: ``run`` jobs, then ``record`` them."""

    def __init__(self, spec: Spec, *, checks: bool, limit_seconds: float, folder: Path) -> None:
        """``spec`` without settings; ``limit_seconds`` from now; ``folder``: where lines go as they come."""
        self.results: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.spec, self._with_checks = spec, checks
        self._deadline = time.monotonic() + limit_seconds
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / f"unfinished-{os.getpid()}.jsonl"
        self._known = tempfile.TemporaryDirectory()

    @property
    def ok(self) -> bool:
        """Whether every check held and every result is there."""
        return all(check["ok"] for check in self.checks) and all(r["status"] == "ok" for r in self.results)

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs, those of several rounds in turns; the reference and the stock path before them."""
        checked = [setting for job in jobs if job.checked for setting in job.settings]
        rounds = max((job.rounds for job in jobs), default=0)
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        try:
            for one in {setting.truth: setting for setting in checked}.values() if self._with_checks else ():
                for system in ("reference", "stock"):
                    how = "none" if system == "reference" else "layer"
                    values = Setting(system, how, one.targets, base=one.base.partition("-")[0])
                    untimed = Job((values,), timed=False)
                    for line in self._process(untimed, checked=True):
                        self._keep_checks(line)
                        if line["status"] != "ok":
                            self.checks.append(_failed_check(line))
            for number in range(rounds):
                # there and back, so that none is always the first
                for job in (job for job in (jobs if number % 2 == 0 else jobs[::-1]) if number < job.rounds):
                    for line in self._process(job, checked=self._with_checks and job.checked and number == 0):
                        self._keep_checks(line)
                        found.setdefault((job.label, line["name"]), []).append(line)
        finally:
            self.results += [merged(label, lines, sum(self.spec.lengths)) for (label, _), lines in found.items()]

    def record(self, kind: str, *, commit: str | None, interrupted: bool, **more: Any) -> dict[str, Any]:
        """All of it, as ``write_record`` takes it; ``more``: other keys of the configuration."""
        spec, shape = self.spec, shape_named(self.spec.model)
        layers = spec.layers or shape.full_layers
        rates = self._ceilings()
        names = [result.pop("device_name", None) for result in self.results]
        lines = {
            target: _roofline(Step(shape.values, layers, spec.lengths, target, spec.rank), rates)
            for target in dict.fromkeys(result["targets"] for result in self.results)
        }
        config = {
            "config": {
                "model": spec.model,
                "layers": layers,
                "full_layers": shape.full_layers,
                "tokens": sum(spec.lengths),
                "documents": len(spec.lengths),
                "lengths": list(spec.lengths),
                "seed": spec.seed,
                "dtype": spec.dtype,
                "lora_rank": spec.rank,
                "lora_alpha": 2 * spec.rank,
                "adapter_dtype": "float32",
                "optimizer": "torch.optim.AdamW(fused=True)",
                "backend": spec.backend,
                "warmup": spec.warmup,
                "steps": spec.steps,
                "baseline": LEAK_FREE,
            },
            "shapes": {name: shape.values[name] for name in _SHAPES if name in shape.values},
            "ceilings": rates,
            "checks": self.checks,
            "results": self.results,
            "roofline": {target: parts for target, parts in lines.items() if parts},
            **more,
        }
        device = next((name for name in names if name), spec.device)
        source = source_of(Path(deltatune.__file__).parent, commit)
        method = METHOD + (CHECKED if self._with_checks else UNCHECKED)
        top = head(kind, spec.model, method, device=device, source=source)
        return top | {"ok": self.ok, "interrupted": interrupted, "configs": [config]}

    def write(self, record: Mapping[str, Any], folder: Path) -> Path:
        """Writes the record; the lines it is made of are not needed any more."""
        path = write_record(record, folder)
        self._lines.unlink(missing_ok=True)
        return path

    def _keep_checks(self, line: dict[str, Any]) -> None:
        self.checks += line.pop("checks", [])

    def _ceilings(self) -> dict[str, float] | None:
        command = [sys.executable, "-m", "benchmarks.timing", self.spec.device, self.spec.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(Job(())))
        rates: dict[str, float] | None = json.loads(done.stdout) if done.returncode == 0 else None
        return rates

    def _process(self, job: Job, *, checked: bool) -> list[dict[str, Any]]:
        """A line for each setting; a process that dies is started again for those behind the one it died of."""
        left, lines = list(job.settings), []
        while left:
            spec = replace(
                self.spec, settings=tuple(left), timed=job.timed, known=self._known.name if checked else None
            )
            found, reason = self._child(spec, job)
            lines += found
            left = left[len(found) :]
            if left:
                status = "not run" if time.monotonic() > self._deadline else "failed"
                ended = left if status == "not run" else left[:1]
                lines += [setting.to_dict() | {"status": status, "reason": reason} for setting in ended]
                left = left[len(ended) :]
        with self._lines.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"label": job.label, **line}) + "\n" for line in lines)
        return lines

    def _child(self, spec: Spec, job: Job) -> tuple[list[dict[str, Any]], str]:
        """The lines of a process, and the last it said."""
        if time.monotonic() > self._deadline:
            return [], "time was up"
        _say(f"{job.label or job.settings[0].system}: {', '.join(setting.name for setting in spec.settings)}")
        with tempfile.TemporaryDirectory() as folder:
            spec_path, lines_path = Path(folder) / "spec.json", Path(folder) / "lines.jsonl"
            spec_path.write_text(spec.to_json(), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.worker", str(spec_path), str(lines_path)]
            with (Path(folder) / "log").open("w+", encoding="utf-8", errors="replace") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(job))
                try:
                    while process.poll() is None and time.monotonic() <= self._deadline:
                        time.sleep(_POLL_SECONDS)
                finally:
                    process.kill()
                    process.wait()
                log.seek(0)
                said = log.read().strip().splitlines()
            lines = lines_path.read_text(encoding="utf-8").splitlines() if lines_path.exists() else []
        found = [json.loads(line) for line in lines]
        for line in found:
            source = line.pop("source", None)
            if job.path and source and Path(source).resolve() != job.path.resolve() / "deltatune":
                line |= {"status": "failed", "reason": "another deltatune than the one asked for was imported"}
            _say(f"  {line['name']}: {line['status']} {_short(line)}")
        late = time.monotonic() > self._deadline
        return found, "time was up" if late else (said[-1] if said else f"exit status {process.returncode}")[:500]


def _environment(job: Job) -> dict[str, str]:
    paths = [*([str(job.path)] if job.path else []), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **job.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def merged(label: str, lines: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One result of the rounds of a setting; what one of them failed with, where one did.

    Rounds that the time did not reach leave those that were timed as they are.
    """
    timed = [line for line in lines if line["status"] == "ok"]
    bad = next((line for line in lines if line["status"] != "ok" and not (timed and line["status"] == "not run")), None)
    merged = {**lines[0], **({"label": label} if label else {})}
    if bad is not None:
        return merged | {"status": bad["status"], "reason": bad["reason"]}
    lines = timed
    if "samples_ms" not in merged:
        return merged
    times = summary(sample for line in lines for sample in line["samples_ms"])
    peaks = [line["peak_bytes"] for line in lines if line["peak_bytes"] is not None]
    return {
        **merged,
        **times,
        "rounds": len(lines),
        "round_medians_ms": [line["median_ms"] for line in lines],
        "tokens_per_second": tokens / (times["median_ms"] / 1e3),
        "peak_bytes": max(peaks) if peaks else None,
    }


def _failed_check(line: Mapping[str, Any]) -> dict[str, Any]:
    detail = f"{line['status']}: {line['reason']}"
    return {"name": "measured", "subject": line["name"], "ok": False, "figure": None, "limit": None, "detail": detail}


def _roofline(step: Step, rates: Mapping[str, float] | None) -> dict[str, Any] | None:
    if rates is None:
        return None
    parts = roofline(
        step, flops_per_second=rates["gemm_flops_per_second"], bytes_per_second=rates["copy_bytes_per_second"]
    )
    return None if parts is None else {"total_ms": sum(part.ms for part in parts), "parts": [vars(p) for p in parts]}


def _short(line: Mapping[str, Any]) -> str:
    if line["status"] != "ok":
        return str(line["reason"])
    if "median_ms" not in line:
        return ""
    peak = f", {line['peak_bytes'] / 2**30:.1f} GiB" if line.get("peak_bytes") else ""
    return f"{line['median_ms']:.1f} ms{peak}"


_STARTED: Final = time.monotonic()


def _say(what: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f} s] {what}\n")
    sys.stderr.flush()


def ours(
    checkpointing: Sequence[str | float], targets: Sequence[str], lora: str = "auto", bases: Sequence[str] = ("",)
) -> tuple[Setting, ...]:
    """Settings of ours."""
    return tuple(Setting(OURS, how, which, lora, base) for which in targets for how in checkpointing for base in bases)
