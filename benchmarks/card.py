"""What a card of 80 GB holds of a mixture whose experts have adapters, by the estimate that ``deltatune plan`` prints.

Nothing is measured here; a record of all layers on a larger card bounds the estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Final

import torch
from torch import nn

from benchmarks.records import Record
from benchmarks.shapes import TARGETS, shape_named
from deltatune.compile.memory import MemoryEstimate
from deltatune.config.schema import Recipe
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.checkpoint import empty_model
from deltatune.training.planned import estimate_step, prepare_by_recipe

__all__ = ["MODEL", "STATES", "built", "card", "layers_that_fit", "step"]

MODEL: Final = "qwen3.5-35b-a3b"
TOKENS: Final = 16384
RANK: Final = 16
#: Layers after which types of layers repeat.
PERIOD: Final = 4
#: GiB that a card of 80 GB shows, and the share of them that a step may take, as ``parallel: auto`` says.
DEVICE_GIB: Final = 79
ROOM: Final = 0.9
#: The optimizer's state -> ``training.optim`` and ``lora.adapter_dtype``.
STATES: Final[Mapping[str, tuple[str, str]]] = {
    "float32": ("adamw_torch_fused", "float32"),
    "8 bits: `optim: adamw_8bit`": ("adamw_8bit", "float32"),
    "16 bits: `adapter_dtype: model`": ("adamw_torch_fused", "model"),
}


@cache
def built(state: str, layers: int) -> MemoryEstimate:
    """Of a model of so many layers, a pack of ``TOKENS`` and ``checkpointing: layer``; ``state`` is of ``STATES``."""
    optimizer, dtype = STATES[state]
    return estimate_step(_recipe(optimizer, dtype), _adapted(dtype, layers), "layer")


def _recipe(optimizer: str, adapter_dtype: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": MODEL, "dtype": "bfloat16"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "packing": {"tokens_per_batch": TOKENS},
            "lora": {"r": RANK, "adapter_dtype": adapter_dtype, **TARGETS["experts"]},
            "compile": True,
            "checkpointing": "layer",
            "training": {"output_dir": "outputs", "bf16": True, "optim": optimizer},
        }
    )


@cache
def _adapted(dtype: str, layers: int) -> nn.Module:
    recipe = _recipe("adamw_torch_fused", dtype)
    model = adapt_by_recipe(empty_model(recipe.model, shape_named(MODEL).config(layers)), recipe)
    prepare_by_recipe(recipe, model, device=torch.device("cpu"))
    return model


def step(state: str, layers: int) -> MemoryEstimate:
    """``built`` from two small models: every period of layers adds the same bytes, the first as any other."""
    one, two = (asdict(built(state, periods * PERIOD)) for periods in (1, 2))
    return MemoryEstimate(**{part: one[part] + (layers // PERIOD - 1) * (two[part] - one[part]) for part in one})


def layers_that_fit(state: str) -> int:
    """The most, in whole periods of layers, of which a step fits."""
    found = range(PERIOD, shape_named(MODEL).full_layers + 1, PERIOD)
    return max(layers for layers in found if step(state, layers).total <= ROOM * DEVICE_GIB * 2**30)


def card(_: Sequence[Record]) -> list[str]:
    """For each state: GiB of all layers by what they are of, and in all; layers that fit."""
    full = shape_named(MODEL).full_layers
    rows = []
    for state in STATES:
        sizes = step(state, full)
        parts = (sizes.weights, sizes.gradients, sizes.optimizer, sizes.activations, sizes.logits, sizes.total)
        rows.append([state, *(f"{part / 2**30:.1f}" for part in parts), str(layers_that_fit(state))])
    header = ("optimizer's state", "weights", "gradients", "state", "activations", "logits", f"GiB of {full} layers",
              f"layers in {ROOM * DEVICE_GIB:.0f} GiB")  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
