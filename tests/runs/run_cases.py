"""Folders as runs leave them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

BASE = {"name_or_path": "/no/such/base", "revision": None, "commit": None, "class": "Qwen3ForCausalLM"}


def leg(status: str = "finished", *, from_step: int = 0, to_step: int = 6, **more: Any) -> dict[str, Any]:
    return {
        "status": status,
        "command": "deltatune train mine.yaml",
        "folder": "/home/me",
        "host": "box",
        "git": None,
        "deltatune": {"version": "0.1.0", "git": None},
        "started": "2026-11-30T06:00:00+00:00",
        "ended": None if status == "running" else "2026-11-30T07:01:02+00:00",
        "from_step": from_step,
        "to_step": to_step,
        "first_loss": 4.0,
        "last_loss": 2.0,
        "eval_loss": 2.5,
        "seconds": 100.0,
        "packs": 6,
        "tokens": 6000,
        "trained_tokens": 1500,
        "changes": [],
        "device": "cpu x86_64",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "data": {"rows.jsonl": "fbd44bd3"},
        **more,
    }


def entry(step: int, loss: Any, *, leg: int = 1) -> dict[str, Any]:
    return {
        "leg": leg,
        "step": step,
        "loss": loss,
        "grad_norm": 1.0 + step,
        "learning_rate": 1e-3 / step,
        "tokens_per_second": 1000.0 + step,
        "peak_memory_gib": 0.5,
    }


def recipe(**training: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": BASE["name_or_path"]},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "packing": {"tokens_per_batch": 256},
        "lora": {"r": 4},
        "training": {"output_dir": "outputs/mine", **training},
    }


def write_run(
    folder: Path,
    *legs: dict[str, Any],
    entries: list[dict[str, Any]] | None = None,
    tail: str = "",
    model: dict[str, Any] | None = None,
    **files: Any,
) -> Path:
    """``files``: ``recipe``, ``report`` and ``log``."""
    folder.mkdir(parents=True, exist_ok=True)
    given = list(legs) or [leg()]
    record = {"status": given[-1]["status"], "model": {**BASE, **(model or {})}, "legs": given}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [entry(step, 5.0 - step / 2) for step in range(1, 7)] if entries is None else entries
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / "config.yaml").write_text(yaml.safe_dump(files.get("recipe", recipe())))
    (folder / "report.json").write_text(json.dumps(files.get("report", {})))
    (folder / "train.log").write_text(files.get("log", "=== then deltatune train\n"))
    return folder


#: What a model or a recipe may say: markup, characters that steer a terminal or turn a line around, lines, indents.
MARKUP = """"></script></td></style><script>console.log('x')</script><img src="https://x.example/a" onerror=alert(1)>"""
STEERING, STEERING_SHOWN = "\x1b[2J\x07\u202eend", r"\x1b[2J\x07\u202eend"
SAMPLES = [
    {"step": 2, "prompt": "write f", "completion": "def f(x):\n    return x < 1 & x > 0", "reference": MARKUP},
    {"step": 2, "prompt": STEERING, "completion": MARKUP},
    {"step": 4, "prompt": "go on", "completion": "word" * 200},
]
SAMPLES_SHOWN = [
    ["step", "prompt", "completion", "reference"],
    ["2", "write f", "def f(x):\n    return x < 1 & x > 0", MARKUP],
    ["2", STEERING_SHOWN, MARKUP, "-"],
    ["4", "go on", "word" * 200, "-"],
]
DIFFERENCES_SHOWN = [
    ["", "one", "two", "three"],
    ["lora.r", "4", "4", "8"],
    ["training.learning_rate", "0.1", "0.5", "0.1"],
    ["training.run_name", MARKUP, STEERING_SHOWN, "-"],
    ["data.train.1.path", "-", "-", "more.jsonl"],
]


def write_unlike_runs(folder: Path) -> list[Path]:
    """Three runs of other recipes, the first with samples: on a page ``DIFFERENCES_SHOWN`` and ``SAMPLES_SHOWN``."""
    third = recipe(learning_rate=0.1)
    third["lora"], third["data"]["train"] = {"r": 8}, [*third["data"]["train"], {"path": "more.jsonl"}]
    recipes = [
        recipe(learning_rate=0.1, run_name=MARKUP, output_dir="a"),
        recipe(learning_rate=0.5, run_name=STEERING, output_dir="b"),
        third,
    ]
    folders = [
        write_run(folder / name, recipe=each) for name, each in zip(("one", "two", "three"), recipes, strict=True)
    ]
    (folders[0] / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    return folders
