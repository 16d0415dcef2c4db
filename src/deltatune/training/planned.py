"""What a recipe makes of a model, with or without its weights: layers, kernels, recomputation, memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup

from deltatune.compile.memory import MemoryEstimate, device_memory, estimate_memory, offloaded_bytes
from deltatune.compile.offloading import IN_FLIGHT_BYTES
from deltatune.config.schema import Recipe
from deltatune.cost import ExpertSplit
from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.options import CompileOptions
from deltatune.parallel.sequence import shard_sequence
from deltatune.phases import phase
from deltatune.preparation import Prepared, prepare
from deltatune.training.arguments import autocast_dtype
from deltatune.training.products import compute_by_recipe

__all__ = [
    "check_adapters",
    "check_offloading",
    "compile_options",
    "estimate_step",
    "expert_split",
    "offloading_lines",
    "prepare_by_recipe",
]


def prepare_by_recipe(
    recipe: Recipe,
    model: nn.Module,
    *,
    device: torch.device | None = None,
    shard: int = 1,
    sequence: int = 1,
    group: ProcessGroup | None = None,
) -> Prepared:
    """``prepare`` with the recipe's kernels, compile, checkpointing and lora settings, ``auto`` decided.

    The products of frozen weights are from here on in the precision that the recipe names.

    ``device`` is where a model that is not there yet, or will be sharded among ``shard`` ranks, will train; its shapes
    decide then. ``sequence`` ranks will hold a pack together, those of ``group`` where they have met.

    Raises:
        UserError: what ``prepare`` refuses, and products that cannot be in the recipe's precision.
    """
    compute_by_recipe(recipe, model, hf_model.device_of(model) if device is None else device)
    try:
        prepared = prepare(
            model,
            kernels=recipe.kernels if isinstance(recipe.kernels, str) else dict(recipe.kernels.items()),
            compile=compile_options(recipe),
            checkpointing=recipe.checkpointing,
            lora="auto" if recipe.lora is None else recipe.lora.impl,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    prepared.computes_in(autocast_dtype(recipe.training), gathered=shard > 1)
    shard_sequence(prepared, group, recurrent=recipe.parallel.recurrent)
    with phase("choosing the activations to keep"):
        prepared.decide_checkpointing(
            recipe.packing.tokens_per_batch // sequence,
            optimizer=recipe.training.optim,
            compute_dtype=autocast_dtype(recipe.training),
            accumulates=recipe.training.gradient_accumulation_steps > 1,
            device=device,
            shard=shard,
            sequence=sequence,
            recurrent=recipe.parallel.recurrent,
            experts=expert_split(recipe),
        )
    return prepared


def expert_split(recipe: Recipe) -> ExpertSplit:
    """How the recipe divides the routed experts."""
    given = recipe.parallel
    return ExpertSplit(1 if given.expert == "auto" else given.expert, given.expert_capacity)


def compile_options(recipe: Recipe) -> CompileOptions | None:
    """The recipe's ``compile`` section as ``prepare`` takes it."""
    return None if recipe.compile is None else CompileOptions(**recipe.compile.model_dump())


def estimate_step(
    recipe: Recipe, model: nn.Module, checkpointing: str | float, *, shard: int = 1, sequence: int = 1
) -> MemoryEstimate:
    """What a step of the recipe will hold on one device."""
    return estimate_memory(
        model,
        tokens_per_batch=recipe.packing.tokens_per_batch // sequence,
        optimizer=recipe.training.optim,
        checkpointing=checkpointing,
        compute_dtype=autocast_dtype(recipe.training),
        in_flight_bytes=IN_FLIGHT_BYTES if recipe.activation_offloading else None,
        shard=shard,
        sequence=sequence,
        recurrent=recipe.parallel.recurrent,
        experts=expert_split(recipe),
    )


def check_adapters(recipe: Recipe, model: nn.Module, device: torch.device, processes: int) -> None:
    """Refuses adapters that no division among the devices of a run makes fit, before they are made.

    Args:
        recipe: the run.
        model: with its adapters, on the meta device.
        device: of each process, all alike.
        processes: of the run.

    Raises:
        UserError: what trains beside a frozen base, with its gradients, is more than the devices have.
    """
    needed = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    available = processes * device_memory(device)
    if recipe.lora is not None and needed > available:
        raise UserError(
            f"lora: adapters and what trains beside them take {needed / 2**30:,.0f} GiB with their gradients, and "
            f"{device} has {available / 2**30:,.0f} GiB; lower lora.r and lora.rank_pattern, or leave modules out"
        )


def check_offloading(recipe: Recipe, device: torch.device) -> None:
    """Refuses to move activations where there is no memory to move them to.

    Raises:
        UserError: with the remedy.
    """
    if recipe.activation_offloading and device.type != "cuda":
        raise UserError(
            f"activation_offloading: true moves activations from a GPU to the host, and the run would train on "
            f"{device}; set it to false"
        )


def offloading_lines(recipe: Recipe, model: nn.Module, checkpointing: str | float, *, sequence: int = 1) -> list[str]:
    """How much of a step lies in the host's memory, where activations are moved there."""
    if not recipe.activation_offloading:
        return []
    size = offloaded_bytes(
        model,
        tokens_per_batch=recipe.packing.tokens_per_batch // sequence,
        checkpointing=checkpointing,
        compute_dtype=autocast_dtype(recipe.training),
        sequence=sequence,
        recurrent=recipe.parallel.recurrent,
    )
    return [f"activation offloading: about {size / 2**30:.1f} GiB of a step lie in pinned host memory, for each GPU"]
