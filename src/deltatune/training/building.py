"""Everything a run needs, loaded, prepared and checked, with nothing written yet; and the report of it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments, set_seed

from deltatune.config.schema import Recipe
from deltatune.errors import user_path
from deltatune.hf import model as hf_model
from deltatune.parallel.filling import from_rank_0
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sizes import Sizes
from deltatune.phases import phase
from deltatune.preparation import Prepared
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.checkpoint import empty_model, load_config, load_tokenizer
from deltatune.training.console import RunConsole
from deltatune.training.continuing import start_lines
from deltatune.training.layout import mesh_of, sizes_lines, sizes_of
from deltatune.training.loading import LoadedModel, load_by_recipe
from deltatune.training.optimizers import optimizer_lines
from deltatune.training.packs import RecipeData, load_data
from deltatune.training.planned import (
    check_adapters,
    check_offloading,
    estimate_step,
    offloading_lines,
    prepare_by_recipe,
)
from deltatune.training.products import check_products, product_lines
from deltatune.training.prompts import samples_lines
from deltatune.training.provenance import versions
from deltatune.training.quantized_weights import quantized_lines
from deltatune.training.space import check_space
from deltatune.verification import VerifyReport

__all__ = ["Described", "Run", "build", "describe", "load", "report_of"]


@dataclass(frozen=True)
class Described:
    """What is known of a run before any weight is read."""

    recipe: Recipe
    arguments: TrainingArguments
    console: RunConsole
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: RecipeData
    mesh: Mesh
    sizes: Sizes
    of_samples: list[str]  # what is to be said of completions

    @property
    def output_dir(self) -> Path:
        """Where the run is saved."""
        return user_path(self.recipe.training.output_dir)


@dataclass(frozen=True)
class Run:
    """Everything a run needs, built and checked, with nothing written yet."""

    recipe: Recipe
    arguments: TrainingArguments
    console: RunConsole
    tokenizer: PreTrainedTokenizerBase
    data: RecipeData
    loaded: LoadedModel
    prepared: Prepared
    mesh: Mesh

    @property
    def model(self) -> nn.Module:
        """What trains."""
        return self.loaded.model

    @property
    def output_dir(self) -> Path:
        """Where the run is saved."""
        return user_path(self.recipe.training.output_dir)


def build(recipe: Recipe, arguments: TrainingArguments, console: RunConsole) -> Run:
    """Loads and prepares everything; cheap checks first, so that a mistake costs seconds."""
    return load(describe(recipe, arguments, console))


def describe(
    recipe: Recipe,
    arguments: TrainingArguments,
    console: RunConsole,
    before_data: Callable[[Mesh], None] = lambda _: None,
) -> Described:
    """Checks names and shapes, divides the work, and reads and packs the rows.

    ``before_data`` hears of the processes before rows are read.
    """
    check_offloading(recipe, arguments.device)
    config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    of_samples = samples_lines(recipe, tokenizer)
    # every name and shape is known before the rows are read and the weights are there
    with phase("describing the model"):  # which imports its code
        empty = adapt_by_recipe(empty_model(recipe.model), recipe)
        check_space(empty, recipe)
        check_adapters(recipe, empty, arguments.device, arguments.world_size)
        check_products(recipe, empty, arguments.device)
        sizes = sizes_of(recipe, empty, arguments)
    if arguments.world_size > 1:  # whose devices may differ
        sizes = from_rank_0(sizes)
    mesh = mesh_of(sizes, arguments)
    before_data(mesh)
    # one process tokenises, the others then read its cache
    with arguments.main_process_first(desc="tokenising"):
        data = load_data(recipe, tokenizer, mesh)
    data.check_tokens(hf_model.base_model(empty).get_input_embeddings().weight.shape[0], tokenizer)
    for line in data.lines():
        console.out(line, highlight=False)
    return Described(recipe, arguments, console, config, tokenizer, data, mesh, sizes, of_samples)


def load(described: Described) -> Run:
    """Loads and prepares the model of a run."""
    recipe, arguments, console, mesh = described.recipe, described.arguments, described.console, described.mesh
    set_seed(arguments.seed)
    loaded = load_by_recipe(recipe, described.config, mesh, arguments.device)
    model = loaded.model
    if not mesh.holds_parts:
        with phase(f"moving the model to {arguments.device}"):
            model.to(arguments.device)
    # no device will hold a divided model, so its shapes decide
    device = arguments.device if mesh.holds_parts else None
    with phase("preparing the model"):
        prepared = prepare_by_recipe(
            recipe,
            model,
            device=device,
            shard=mesh.shard_size,
            sequence=mesh.sequence_size,
            group=mesh.sequence_group(arguments.device.type),
        )
    said = [prepared.report.text(console.table_width), *quantized_lines(model)]
    said += [*product_lines(recipe, model, arguments.device), *start_lines(recipe.lora)]
    said += offloading_lines(recipe, model, prepared.report.checkpointing, sequence=mesh.sequence_size)
    said += [*sizes_lines(recipe, described.sizes), *loaded.said, *described.of_samples]
    for line in [*said, *optimizer_lines(model, recipe.training)]:
        console.out(line, highlight=False)
    return Run(recipe, arguments, console, described.tokenizer, described.data, loaded, prepared, mesh)


def report_of(run: Run, verified: VerifyReport | None) -> dict[str, Any]:
    """What was done to the model, what the packs and the memory are, and what the probe found: ``report.json``."""
    report, device = run.prepared.report, run.arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    sizes = {"shard": run.mesh.shard_size, "sequence": run.mesh.sequence_size}
    estimate = estimate_step(run.recipe, run.model, report.checkpointing, **sizes)
    choice = run.prepared.auto_checkpointing
    return {
        "prepare": report.to_dict(),
        "checkpointing_reason": None if choice is None else choice.reason,
        "data": {
            "train": asdict(run.data.train.report),
            "eval": None if run.data.eval is None else asdict(run.data.eval.report),
        },
        "memory_estimate": estimate.to_dict(),
        "predicted_peak_bytes": None if choice is None else choice.predicted_bytes,
        "verify": None if verified is None else verified.to_dict(),
        "device": name,
        "versions": versions(),
    }
