"""The page of ``deltatune plan``: what the model, the packs and the steps of a run would be."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from deltatune.compile.memory import MemoryEstimate, device_memory, optimizer_bytes
from deltatune.config.schema import Recipe
from deltatune.data.dataset import PackedDataset
from deltatune.data.report import counted
from deltatune.data.stream import PackStream
from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sizes import Sizes
from deltatune.preparation import Prepared
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.arguments import training_arguments
from deltatune.training.batches import PackOrder, count_steps
from deltatune.training.checkpoint import empty_model
from deltatune.training.continuing import load_adapter, start_lines
from deltatune.training.layout import sizes_lines, sizes_of
from deltatune.training.loading import host_lines
from deltatune.training.optimizers import optimizer_lines
from deltatune.training.packs import RecipeData
from deltatune.training.planned import (
    check_adapters,
    check_offloading,
    estimate_step,
    offloading_lines,
    prepare_by_recipe,
)
from deltatune.training.products import check_products, product_lines
from deltatune.training.prompts import samples_lines
from deltatune.training.quantized_base import quantized_base
from deltatune.training.quantized_weights import quantized_lines
from deltatune.training.since import change_lines, changed_data, changed_steps, place_of
from deltatune.training.space import check_space

__all__ = ["GoingOn", "show"]

_EIGHT_BIT: Final = "adamw_8bit"
#: Bytes worth a line.
_WEIGHS: Final = 2**28


@dataclass(frozen=True)
class GoingOn:
    """Where a run begins."""

    checkpoint: Path | None
    allow_change: bool
    said: Sequence[str]  # of it, line by line

    def lines(self, recipe: Recipe, data: RecipeData, mesh: Mesh) -> list[str]:
        """What is said of it, and of packs and rows that are others since.

        Raises:
            UserError: other ones, and that has to be allowed; or a stream that was left by other ranks.
        """
        changes = changed_steps(recipe, self.checkpoint, mesh, allow=self.allow_change)
        changes += changed_data(recipe, data, self.checkpoint, allow=self.allow_change)
        if self.checkpoint is not None and isinstance(data.train, PackStream):
            place_of(self.checkpoint, mesh)
        return [*self.said, *change_lines(changes, self.checkpoint)]


def show(
    recipe: Recipe,
    warnings: Sequence[str],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: RecipeData,
    going_on: GoingOn,
    *,
    nproc: int | None = None,
) -> None:
    """Prints what a run of the recipe would do, by as many processes as ``nproc`` says.

    Raises:
        UserError: what the run would stop at.
    """
    arguments = training_arguments(recipe.training, nproc=nproc)
    warnings = [*warnings, *_missing_here(recipe, arguments.device)]
    model = adapt_by_recipe(empty_model(recipe.model, config), recipe)
    load_adapter(model, recipe.lora)
    room, processes = check_space(model, recipe), nproc or _processes(recipe, arguments)
    if not _is_elsewhere(recipe, arguments.device):
        check_adapters(recipe, model, arguments.device, processes)
        check_products(recipe, model, arguments.device)
    sizes = sizes_of(recipe, model, arguments, processes)
    prepared, unavailable = _prepared(recipe, model, arguments.device, sizes)
    data.check_tokens(hf_model.base_model(model).get_input_embeddings().weight.shape[0], tokenizer)
    report = prepared.report
    sys.stdout.writelines(f"warning: {warning}\n" for warning in [*warnings, *unavailable, *room.warnings()])
    lines = [f"model {recipe.model.name_or_path} on {arguments.device}", "", report.text(_terminal_width())]
    lines += quantized_lines(model, quantized_base(recipe.model, config))
    lines += product_lines(recipe, model, arguments.device)
    lines += [*start_lines(recipe.lora), *optimizer_lines(model, recipe.training)]
    lines += [*sizes_lines(recipe, sizes), *(host_lines(recipe, model) if max(sizes.shard, sizes.expert) > 1 else [])]
    mesh = Mesh.at(sizes.processes, arguments.process_index, shard=sizes.shard, sequence=sizes.sequence)
    lines += [
        *going_on.lines(recipe, data, mesh),
        "",
        *data.lines(),
        *_steps(data.train, arguments, mesh),
        *samples_lines(recipe, tokenizer),
        *room.lines(),
    ]
    estimate = estimate_step(recipe, model, report.checkpointing, shard=sizes.shard, sequence=sizes.sequence)
    available = device_memory(arguments.device)
    verdict = "" if estimate.total <= available else ": more than there is"
    lines += ["", "memory estimate of a step on one device", str(estimate)]
    lines += [f"{arguments.device} has {available / 2**30:.1f} GiB{verdict}", *_smaller_state(recipe, model, estimate)]
    lines += offloading_lines(recipe, model, report.checkpointing, sequence=sizes.sequence)
    sys.stdout.write("\n".join(lines) + "\n")


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _is_elsewhere(recipe: Recipe, device: torch.device) -> bool:
    """Whether the run is meant for another machine: there is no accelerator here, and the recipe wants one."""
    return device.type == "cpu" and not recipe.training.use_cpu


def _missing_here(recipe: Recipe, device: torch.device) -> list[str]:
    """The GPU whose activations move, which a run on another machine may find there.

    Raises:
        UserError: it is missing where the run will train.
    """
    if not _is_elsewhere(recipe, device):
        check_offloading(recipe, device)
        return []
    if not recipe.activation_offloading:
        return []
    return [f"activation_offloading: true needs a GPU where the run will train; here it would be {device}"]


def _processes(recipe: Recipe, arguments: TrainingArguments) -> int:
    """Those that were started, or for one that plans, those that the recipe asks for."""
    if arguments.world_size > 1:
        return int(arguments.world_size)
    given = recipe.parallel
    holding = math.prod(size for size in (given.replicate, given.shard) if size != "auto")
    others = (1 if size == "auto" else size for size in (given.sequence, given.expert))
    return math.lcm(holding, *others)


def _prepared(recipe: Recipe, model: nn.Module, device: torch.device, sizes: Sizes) -> tuple[Prepared, list[str]]:
    """The model as it will train, and what of it is known to be otherwise where the run will train.

    Raises:
        UserError: what ``prepare`` refuses.
    """
    planned = partial(prepare_by_recipe, model=model, device=device, shard=sizes.shard, sequence=sizes.sequence)
    try:
        return planned(recipe), []
    except UserError as error:
        if recipe.kernels == "auto" or not _is_elsewhere(recipe, device):
            raise
        prepared = planned(recipe.model_copy(update={"kernels": "auto"}))
        return prepared, [f"{error}; what follows is for kernels: auto"]


def _smaller_state(recipe: Recipe, model: nn.Module, estimate: MemoryEstimate) -> list[str]:
    """The same optimizer in 8 bits, where its state weighs: of adapters on experts it often dominates."""
    if not recipe.training.optim.startswith("adamw") or "8bit" in recipe.training.optim:
        return []
    eight = sum(optimizer_bytes(p, _EIGHT_BIT) for p in model.parameters() if p.requires_grad)
    if estimate.optimizer - eight < _WEIGHS:
        return []
    return [
        f"the optimizer's state is {estimate.optimizer / 2**30:.1f} GiB of it; training.optim: {_EIGHT_BIT} keeps "
        f"{eight / 2**30:.1f} GiB (pip install 'deltatune[optimizers]')"
    ]


def _steps(packs: PackedDataset | PackStream, arguments: TrainingArguments, mesh: Mesh) -> list[str]:
    """What a run takes of the packs: a short last accumulation is a step as well."""
    order = PackOrder(len(packs), mesh=mesh, drop_last=arguments.dataloader_drop_last)
    per_epoch, total = count_steps(len(order), arguments)
    per_step = mesh.data_size * arguments.gradient_accumulation_steps
    epochs = f", {counted(per_epoch, 'step')} an epoch, {total / per_epoch:.2f} epochs"
    return [
        f"{counted(total, 'step')} of {counted(per_step, 'pack')} ({per_step * packs.report.tokens_per_batch:,} tokens)"
        f"{'' if isinstance(packs, PackStream) else epochs}"
    ]
