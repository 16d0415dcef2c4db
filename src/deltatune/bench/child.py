"""One system in a process of its own: what must be stopped when it takes too long, or begin from known caches.

``python -m deltatune.bench.child SPEC RESULT`` runs it: both are paths of JSON files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from deltatune.bench.gates import ALLOWED, PLAUSIBLE, Gradients, loss_and_gradients, relative
from deltatune.bench.race import failures, first_step, outcome_of, race
from deltatune.bench.shapes import build_model, shape_named
from deltatune.bench.systems import Adapters, Setting, System, build_system
from deltatune.bench.workload import Batch, Workload
from deltatune.compile.graphs import CompileOptions

__all__ = ["COMPILED", "in_child", "main"]

COMPILED: Final = "stock compiled"
"""The leak-free stock baseline with its decoder, from the embedding to the last norm, compiled whole by torch.compile's
defaults; the fused loss, which cannot be traced, stays outside."""

_POLL_SECONDS: Final = 0.5
_MORE_SECONDS: Final = 120.0
#: Where Inductor keeps its graphs and the kernels it wrote; those of libraries are elsewhere.
_GRAPH_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"


def in_child(
    setting: Setting, spec: Mapping[str, Any], *, limit_seconds: float, graph_cache: Path | None = None
) -> dict[str, Any]:
    """Keys of the record's result: timed, failed, or ``status: timeout`` where its first step took longer than a limit.

    The gradients of its first batch must be within ``spec["bound"]`` of the same system's uncompiled. None, at a depth
    whose rounding nobody knows, has the bound measured there: ``ALLOWED`` times as far as the stock path is from them.

    Args:
        setting: the system.
        spec: ``model``, ``layers``, ``lengths``, ``seed``, ``dtype``, ``device``, ``rank``, ``alpha``,
            ``adapter_dtype``, ``backend``, ``bound``, ``warmup``, ``steps``.
        limit_seconds: from the start of the process to the end of its first step.
        graph_cache: the folder of compiled graphs; the process's usual one by default.
    """
    environment = os.environ | ({} if graph_cache is None else {_GRAPH_CACHE: str(graph_cache)})
    with tempfile.TemporaryDirectory() as folder:
        spec_path, result_path = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_path.write_text(json.dumps(dict(spec) | {"setting": asdict(setting)}), encoding="utf-8")
        command = [sys.executable, "-m", "deltatune.bench.child", str(spec_path), str(result_path)]
        with (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                return _outcome(process, result_path, log, limit_seconds)
            finally:
                process.kill()
                process.wait()


def main(arguments: list[str]) -> int:
    """The child's side."""
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    result = Path(arguments[1])
    found: dict[str, Any] = {}
    try:
        _measure(spec, _marker(result), found)
    except failures() as error:
        status, reason = outcome_of(error)
        found |= {"status": status, "reason": reason}
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _measure(spec: Mapping[str, Any], marker: Path, found: dict[str, Any]) -> None:
    """The first step, which ``marker`` is left behind, its gradients against the uncompiled ones, and timed steps."""
    base, workload = _base(spec)
    setting, lora, options = _as_asked(spec)
    system = build_system(setting, base, lora, options=options, seed=spec["seed"])
    batch = workload.batch(0).to(system.device)
    eager: Gradients = {}
    if system.prepared is None:
        _, eager = loss_and_gradients(system, batch)
        system.model.get_base_model().get_decoder().compile()
        system.started = time.perf_counter()
    first_step(system, workload)
    marker.touch()
    found["first_step_seconds"] = system.first_step_seconds
    if system.prepared is not None:
        with system.eager():
            _, eager = loss_and_gradients(system, batch)
    found["gradient_distance"] = distance = relative(loss_and_gradients(system, batch)[1], eager)
    bound = spec["bound"]
    if bound is None:
        apart = _distance_of_stock(base, setting, lora, batch, eager, seed=spec["seed"])
        found["gradient_bound"] = bound = ALLOWED * apart
        if not apart <= PLAUSIBLE:
            reason = f"ours uncompiled and the stock path are {apart:.1e} apart: no rounding, so one of them is wrong"
            found |= {"status": "red gate", "reason": reason}
            return
    if distance <= bound:
        found |= _timed(system, workload, spec)
    else:
        reason = f"its gradients are {distance:.1e} from the uncompiled ones, at most {bound:.1e} is rounding"
        found |= {"status": "red gate", "reason": reason}


def _distance_of_stock(
    base: Any, setting: Setting, lora: Adapters, batch: Batch, eager: Gradients, *, seed: int
) -> float:
    """How far the stock path's gradients are from ours, uncompiled: two paths that round apart."""
    stock = build_system(replace(setting, system="stock", checkpointing="layer", lora="stock"), base, lora, seed=seed)
    return relative(loss_and_gradients(stock, batch)[1], eager)


def _timed(system: System, workload: Workload, spec: Mapping[str, Any]) -> dict[str, Any]:
    laps = race({"": system}, workload, warmup=spec["warmup"], steps=spec["steps"], rounds=1)[""]
    if laps.failure is not None:
        return {"status": laps.failure[0], "reason": laps.failure[1]}
    return {
        "status": "ok",
        "reason": None,
        **laps.timing.to_dict(),
        "static_bytes": system.static_bytes(),
        "peak_bytes": system.static_bytes() + laps.peak_bytes if system.device.type == "cuda" else None,
        **_compiler(system),
    }


def _compiler(system: System) -> dict[str, Any]:
    report = None if system.prepared is None else system.prepared.compile_report
    if report is not None:
        return {
            "compile_seconds": report.seconds,
            "graphs": dict(report.graphs),
            "breaks": len(report.breaks),
            "recompiles": len(report.recompiles),
        }
    counters = torch._dynamo.utils.counters
    return {
        "graphs": {"decoder": counters["stats"]["unique_graphs"]},
        "breaks": sum(counters["graph_break"].values()),
    }


def _base(spec: Mapping[str, Any]) -> tuple[Any, Workload]:
    """The stock model without adapters, and the batches."""
    shape, device, dtype = shape_named(spec["model"]), torch.device(spec["device"]), getattr(torch, spec["dtype"])
    base = build_model(shape, device, layers=spec["layers"], dtype=dtype, seed=spec["seed"])
    return base, Workload(tuple(spec["lengths"]), base.config.vocab_size, spec["seed"], device.type == "cuda")


def _as_asked(spec: Mapping[str, Any]) -> tuple[Setting, Adapters, CompileOptions | None]:
    setting, lora = Setting(**spec["setting"]), Adapters(spec["rank"], spec["alpha"], spec["adapter_dtype"])
    compiled = setting.system == "deltatune" and spec["backend"] != "none"
    return setting, lora, CompileOptions(backend=spec["backend"]) if compiled else None


def _outcome(process: subprocess.Popen[bytes], result: Path, log: TextIO, limit_seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    while process.poll() is None:
        waited = time.monotonic() - started
        if waited > limit_seconds and not _marker(result).exists():
            return {"status": "timeout", "reason": f"no first step after {limit_seconds:.0f} s"}
        if waited > limit_seconds + _MORE_SECONDS:
            return {"status": "timeout", "reason": f"a first step, but not timed after {waited:.0f} s"}
        time.sleep(_POLL_SECONDS)
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    log.seek(0)
    lines = log.read().strip().splitlines()
    return {"status": "failed", "reason": (lines[-1] if lines else f"exit status {process.returncode}")[:500]}


def _marker(result: Path) -> Path:
    return result.with_suffix(".first")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
