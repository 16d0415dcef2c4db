"""Compiling what a recipe's run will compile, before it: the compilers keep their results on disk."""

# G value heads

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from deltatune.config.reference import base_is_start
from deltatune.config.schema import Recipe
from deltatune.packing.collate import PackedCollator
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.arguments import autocast_dtype, training_arguments
from deltatune.training.checkpoint import empty_model, load_config, new_model
from deltatune.training.planned import prepare_by_recipe
from deltatune.training.preference import as_reference

__all__ = ["build", "document_counts", "shallow"]


def build(recipe: Recipe, device: torch.device) -> Iterator[tuple[str, float]]:
    """Trains a step of the recipe's model, shallow and at random, for every kernel that its run may choose.

    Each step is named, with its seconds.

    Layers, adapters, kernels, compile options and the checkpointing setting are the recipe's, and so are the shapes of
    a pack: kernels of Triton and TileLang and Inductor's graphs of the layers are then in their caches on disk, and the
    run itself finds them there.

    Raises:
        UserError: a model that cannot be found or prepared.
    """
    model, autocast = _model(recipe, device)
    config = model.config.get_text_config()
    for count in document_counts(config, device):
        documents = f"{count} document{'s' * (count > 1)}"
        yield f"a step, {documents}", _seconds(model, _batch(recipe, config, count, device), autocast)
    in_step = base_is_start(recipe.lora, recipe.training.unfrozen_parameters)
    if recipe.preference is not None and recipe.preference.has_reference and in_step:
        with as_reference(model):
            seconds = _seconds(model, _batch(recipe, config, 1, device), autocast)
        yield "the reference", seconds
    if recipe.data.eval:
        model.eval()
        with torch.no_grad():
            yield "evaluation", _seconds(model, _batch(recipe, config, 1, device), autocast)


def document_counts(config: Any, device: torch.device) -> list[int]:
    """One count of documents for each kernel that FlashQLA may choose; one for a model without a delta rule.

    It compiles its forward for blocks of 32, 64 or 128 value dims: the smaller ones for packs whose documents times
    value heads would leave processors without work. The limits are a factor of two apart, so counts that double meet
    every class.
    """
    G = getattr(config, "linear_num_value_heads", None)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    counts = [1]
    while G is not None and counts[-1] * G < processors:
        counts.append(2 * counts[-1])
    return counts


def shallow(config: Any) -> Any:
    """The config with the fewest layers that hold every kind twice: in front of the first adapter and behind it."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    depth = min(len(kinds), 2 * (1 + max(kinds.index(kind) for kind in kinds)))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = kinds[:depth]
    return config


def _model(recipe: Recipe, device: torch.device) -> tuple[Any, torch.dtype | None]:
    """As the run prepares it, and the dtype of its autocast."""
    training_arguments(recipe.training)  # refuses what the run would refuse
    if recipe.checkpointing == "auto":  # decided at the model's own depth
        whole = prepare_by_recipe(recipe, adapt_by_recipe(empty_model(recipe.model), recipe), device=device)
        recipe = recipe.model_copy(update={"checkpointing": whole.report.checkpointing})
    with device:
        model = adapt_by_recipe(new_model(recipe.model, shallow(load_config(recipe.model))), recipe)
    model.to(device)
    prepare_by_recipe(recipe, model)
    return model.train(), autocast_dtype(recipe.training)


def _batch(recipe: Recipe, config: Any, count: int, device: torch.device) -> dict[str, Any]:
    """A pack of documents of about equal length."""
    tokens = recipe.packing.tokens_per_batch
    ends = [tokens * i // count for i in range(count + 1)]
    draw = np.random.default_rng(0)
    samples = [{"input_ids": draw.integers(1, config.vocab_size, end - start)} for start, end in pairwise(ends)]
    batch: dict[str, Any] = PackedCollator(tokens_per_batch=tokens, pad_token_id=0)(samples)
    return {name: batch[name].to(device) for name in ("input_ids", "labels", "position_ids", "sequences")}


def _seconds(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None) -> float:
    device = batch["input_ids"].device
    started = time.perf_counter()
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
