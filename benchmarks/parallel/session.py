"""All launches of one model, and what they found as one record."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import deltatune
from benchmarks.parallel.checks import whole_step
from benchmarks.parallel.launch import Launcher
from benchmarks.parallel.spec import CHECK, Item, Spec
from benchmarks.parallel.systems import SYSTEMS
from benchmarks.records import head, source_of, write_record
from benchmarks.shapes import shape_named

__all__ = ["COLD", "Session", "say"]

METHOD: Final = (
    "a sample is the time between the ends of two training steps of the rank that took longest, by CUDA events (the "
    "wall clock on a CPU): the batch to the device, forward, loss, backward, AdamW(fused=True) with learning rate 0, "
    "gradients set to None; the first of them dropped, but of long steps; one GPU is rank 0 while the others wait on "
    "the host, in the same processes where a record has both; tokens_per_second_per_gpu over that on one GPU is the "
    "scaling; peak_bytes is all that a process holds at its peak, of the rank that holds most; exchange_ms is the mean "
    "over ranks of all-to-all kernels in a profiled step, and of all-gather kernels where these hand states round, "
    "waiting for others included; first steps with label cold have every compiler's cache empty, and count from the "
    "start of the processes (since_start_seconds) and from that of building the model (first_step_seconds)"
)
CHECKED: Final = (
    "; timed after four layers' losses and gradients on all ranks were held to one process and to float32, and where "
    "the whole step's loss and gradient norm are those of one GPU"
)
UNCHECKED: Final = "; four layers not held to one process in this run"
#: Label of first steps with empty caches.
COLD: Final = "cold"
_CACHES: Final = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TILELANG_CACHE_DIR": "tilelang"}
_STARTED: Final = time.monotonic()


def say(what: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f} s] {what}\n")
    sys.stderr.flush()


class Session:
    """One model: ``run``, then ``record``."""

    def __init__(self, spec: Spec, *, checks: bool, limit_seconds: float, timeout_s: float, folder: Path) -> None:
        """``spec`` without items; ``limit_seconds`` from now; ``timeout_s`` of one item; ``folder``: of lines, logs."""
        self.spec, self.results, self.checks = spec, list[dict[str, Any]](), list[dict[str, Any]]()
        self._with_checks = checks
        self._launcher = Launcher(folder, deadline=time.monotonic() + limit_seconds, timeout_s=timeout_s, say=say)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / f"unfinished-{os.getpid()}.jsonl"

    @property
    def ok(self) -> bool:
        """Whether every check held and every result is there."""
        return all(check["ok"] for check in self.checks) and all(r["status"] == "ok" for r in self.results)

    def run(
        self, systems: Sequence[str], gpus: Sequence[int], tokens: Mapping[str, Sequence[int]], *, cold: bool
    ) -> None:
        """Every system on every number of GPUs, one GPU in the first launch of more.

        Args:
            systems: names.
            gpus: ascending, 1 among them where scaling is wanted.
            tokens: system -> tokens of its packs or documents.
            cold: first steps of the first system with empty caches, on one GPU and on each larger number, before all.
        """
        with tempfile.TemporaryDirectory(prefix="caches-") as caches:
            if cold:
                for number, count in enumerate(reversed(gpus)):
                    # the first leaves its caches to all that follows
                    where = Path(caches) / ("shared" if not number else f"cold-{count}")
                    self._cold(Item(systems[0], tokens[systems[0]][0], count), where)
            several = [count for count in gpus if count > 1]
            for number, count in enumerate(several or [1]):
                items = [self._items(name, count, tokens[name], ones=1 in gpus and not number) for name in systems]
                self._launch(count, tuple(item for of in items for item in of), Path(caches) / "shared")

    def record(self, *, commit: str | None, interrupted: bool, gpus: Sequence[int]) -> dict[str, Any]:
        """All of it, as ``write_record`` takes it."""
        spec, shape = self.spec, shape_named(self.spec.model)
        names = [result.pop("device_name", None) for result in self.results]
        config = {
            "config": {
                "model": spec.model,
                "layers": spec.layers or shape.full_layers,
                "full_layers": shape.full_layers,
                "gpus": list(gpus),
                "seed": spec.seed,
                "dtype": spec.dtype,
                "lora_rank": spec.rank,
                "lora_alpha": 2 * spec.rank,
                "optimizer": "torch.optim.AdamW(fused=True)",
                "backend": spec.backend,
                "check_tokens": spec.check_tokens,
                "warmup": spec.warmup,
                "steps": spec.steps,
                "seconds": spec.seconds,
            },
            "systems": {name: SYSTEMS[name].how for name in dict.fromkeys(r["system"] for r in self.results)},
            "checks": self.checks,
            "results": self.results,
        }
        device = next((name for name in names if name), spec.device)
        source = source_of(Path(deltatune.__file__).parent, commit)
        method = METHOD + (CHECKED if self._with_checks else UNCHECKED)
        top = head("parallel", spec.model, method, device=device, source=source)
        return top | {"ok": self.ok, "interrupted": interrupted, "configs": [config]}

    def write(self, record: Mapping[str, Any], folder: Path) -> Path:
        """Writes the record; the lines it is made of are not needed any more."""
        path = write_record(record, folder)
        self._lines.unlink(missing_ok=True)
        return path

    def _cold(self, item: Item, caches: Path) -> None:
        spec = replace(self.spec, items=(item,), steps=0)
        self._launcher.run(spec, item.gpus, _caches(caches), lambda line: self._keep(line | {"label": COLD}))

    def _items(self, system: str, count: int, tokens: Sequence[int], *, ones: bool) -> list[Item]:
        """The check, then each size on one GPU and on all."""
        checks = [Item(system, self.spec.check_tokens, CHECK)] if self._with_checks and count > 1 else []
        numbers = ([1] if ones else []) + ([count] if count > 1 else [])
        return checks + [Item(system, size, number) for size in tokens for number in numbers]

    def _launch(self, count: int, items: tuple[Item, ...], caches: Path) -> None:
        self._launcher.run(replace(self.spec, items=items), count, _caches(caches, os.environ), self._keep)

    def _keep(self, line: dict[str, Any]) -> None:
        """A result, or the checks of the results behind it."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if line["gpus"] == CHECK:
            self.checks += line.get("checks", [])
            if line["status"] != "ok" and not line.get("checks"):
                detail = f"{line['status']}: {line['reason']}"
                empty = {"figure": None, "limit": None, "detail": detail}
                self.checks.append({"name": "measured", "subject": line["name"], "ok": False, **empty})
            return
        self.results.append(line)
        one = next((r for r in self.results if _pair(r) == _pair(line) and r["gpus"] == 1), None)
        if line["gpus"] > 1 and one is not None and one["status"] == line["status"] == "ok" and "label" not in line:
            self._compare(one, line)

    def _compare(self, one: Mapping[str, Any], line: dict[str, Any]) -> None:
        found = whole_step(one, line)
        self.checks += [check.to_dict() for check in found]
        red = [check.name for check in found if not check.ok]
        for check in found:
            say(f"  {'ok ' if check.ok else 'RED'} {check.name}: {check.detail}")
        if red:
            line |= {"status": "red check", "reason": f"not timed: {', '.join(red)}"}


def _pair(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["system"], result["tokens"], result.get("label")


def _caches(folder: Path, given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Where every rank finds what another compiled; folders of the user's own are taken as they are."""
    return {name: given.get(name, str(folder / inside)) for name, inside in _CACHES.items()}
