"""Synthetic records: figures chosen, not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30


def step(system: str, checkpointing: object, ms: float, gib: float, **more: Any) -> dict[str, Any]:
    """A result of a training record."""
    result = {
        "system": system,
        "checkpointing": checkpointing,
        "checkpointing_taken": checkpointing,
        "targets": "qkvo",
        "lora": "stock",
        "leak_free": system != "stock as shipped",
        "status": "ok",
        "reason": None,
        "median_ms": ms,
        "p20_ms": ms - 1,
        "p80_ms": ms + 1,
        "samples_ms": [ms],
        "tokens_per_second": 16384 / (ms / 1e3),
        "peak_bytes": int(gib * GIB),
        "mfu": 0.4,
    }
    if system == "deltatune":
        result |= {"of_floor": 200 / ms, "host_syncs": 0, "graphs": {"linear_attention": 1, "full_attention": 1}}
        result |= {"breaks": 0, "recompiles": 0, "first_step_seconds": 30.0, "predicted_bytes": int(gib * GIB)}
    name = " ".join(map(str, (system, checkpointing, result["targets"])))
    return {**result, **more, "name": more.get("name", name + (" all" if more.get("targets") == "all" else ""))}


def failed(system: str, checkpointing: object, status: str, reason: str) -> dict[str, Any]:
    """A result without figures."""
    keys = ("name", "system", "checkpointing", "targets", "lora", "leak_free")
    return {key: step(system, checkpointing, 1, 1)[key] for key in keys} | {"status": status, "reason": reason}


def training_record(
    results: list[dict[str, Any]],
    *,
    kind: str = "train",
    model: str = "qwen3.5-2b",
    date: str = "2026-01-02",
    **config: Any,
) -> dict[str, Any]:
    """A training record of one config."""
    about = {"model": model, "layers": 24, "full_layers": 24, "tokens": 16384, "documents": 25, "lengths": [16384]}
    about |= {"dtype": "bfloat16", "lora_rank": 16, "adapter_dtype": "float32", "baseline": "stock modules."}
    return {
        "schema": 1,
        "kind": kind,
        "subject": model,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"},
        "date": date,
        "method": "made up; not measured",
        "ok": True,
        "configs": [{"config": {**about, **config}, "gates": [{"ok": True}], "results": results}],
    }


def op_result(impl: str, what: str, share: float, **more: Any) -> dict[str, Any]:
    """A result of an op's record."""
    times = {"median_ms": 1 / share, "p20_ms": 1.0, "p80_ms": 2.0, "samples_ms": [1.0]}
    known = {"impl": impl, "by": "deltatune", "what": what, "status": "ok", "reason": None, "of_floor": share}
    return {**known, **times, "peak_bytes": GIB, **more}


def op_record(
    op: str, configs: list[tuple[dict[str, Any], list[dict[str, Any]]]], date: str = "2026-01-02"
) -> dict[str, Any]:
    """A record of an op from pairs of sizes and results."""
    made = [
        {
            "config": sizes,
            "auto": "triton",
            "ceilings": {"copy_bytes_per_second": 4e12, "copy_bytes": 1},
            "errors": {"triton": {"y": 1.7e-3}},
            "error_budget": {"y": 1.7e-3},
            "input_bytes": 0,
            "results": results,
        }
        for sizes, results in configs
    ]
    top = training_record([], kind=f"ops/{op}", model=op, date=date)
    return {**top, "configs": made}


def write(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """Puts a record into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(record), encoding="utf-8")
    return path
