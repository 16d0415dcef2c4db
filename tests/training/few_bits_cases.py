"""Small checkpoints and recipes over a base in few bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from training_cases import byte_tokenizer, make_recipe, save_checkpoint

from deltatune.config.schema import Recipe
from tiny import tiny_model

SIZES: Final = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
DENSE: Final[dict[str, Any]] = {"lora": {"r": 4, "target_modules": "all-linear", "target_parameters": None}}


def base(folder: Path, family: str = "qwen3_5_moe", **sizes: int) -> Path:
    model = tiny_model(family, vocab_size=len(byte_tokenizer()), dtype=torch.bfloat16, **{**SIZES, **sizes})
    return save_checkpoint(folder / "base", model)


def recipe_of(folder: Path, checkpoint: Path, quantization: dict[str, Any] | None, **sections: Any) -> Recipe:
    lora = {"r": 4, "target_modules": "all-linear", "target_parameters": "all-experts"}
    folder.mkdir(exist_ok=True)
    model = {"name_or_path": str(checkpoint)} | ({} if quantization is None else {"quantization": quantization})
    return make_recipe(folder, checkpoint, **{"model": model, "lora": lora, **sections})


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "run.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
