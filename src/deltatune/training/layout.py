"""A recipe's processes: replicas, shards and ranks of a pack, settled before any of them has met another."""

from __future__ import annotations

import gc

from torch import nn
from transformers import PreTrainedConfig, TrainingArguments, set_seed

from deltatune.compile.memory import device_memory
from deltatune.config.rules import sharding_errors
from deltatune.config.schema import Recipe
from deltatune.data.report import counted
from deltatune.errors import UserError, one_line
from deltatune.parallel.filling import fill
from deltatune.parallel.heads import check_sequence_size, sequence_sizes
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sharding import shard_model
from deltatune.parallel.sizes import Sizes, choose_sizes
from deltatune.phases import phase
from deltatune.training.arguments import autocast_dtype
from deltatune.training.loading import LoadedModel
from deltatune.training.planned import estimate_step, prepare_by_recipe

__all__ = ["check_sequence", "mesh_of", "shard_by_recipe", "sizes_lines", "sizes_of"]

#: What a step may take of a device, beside what is not estimated.
_ROOM = 0.9


def sizes_of(recipe: Recipe, model: nn.Module, arguments: TrainingArguments, processes: int | None = None) -> Sizes:
    """Replicas, shards and ranks of a pack of a recipe on the processes that were started, or on so many.

    Args:
        recipe: whose section ``parallel`` says what is given.
        model: with its adapters, on the meta device; it is prepared where the memory of a step decides.
        arguments: the recipe's.
        processes: the launcher's by default.

    Raises:
        UserError: sizes that are not these processes', or settings that cannot act on sharded weights.
    """
    given = recipe.parallel
    check_sequence(recipe, model.config)
    numbers = [None if size == "auto" else int(size) for size in (given.replicate, given.shard, given.sequence)]
    available = device_memory(arguments.device) * _ROOM
    checkpointing = "layer" if recipe.checkpointing == "auto" else recipe.checkpointing
    prepared: list[object] = []
    errors = list(sharding_errors(recipe))

    def fits(shard: int, sequence: int) -> bool:
        if shard > 1 and errors:
            return False
        if not prepared:
            prepared.append(prepare_by_recipe(recipe, model, device=arguments.device))
        return estimate_step(recipe, model, checkpointing, shard=shard, sequence=sequence).total <= available

    count = arguments.world_size if processes is None else processes
    try:
        sizes = choose_sizes(
            count,
            replicate=numbers[0],
            shard=numbers[1],
            sequence=numbers[2],
            sequences=_sequences(recipe, model.config),
            fits=fits,
        )
    except ValueError as error:
        start = "" if count > 1 else "; start several with torchrun --nproc-per-node N -m deltatune train RECIPE"
        raise UserError(f"parallel.{error}{start}") from error
    if sizes.shard > 1 and errors:
        raise UserError(f"parallel.shard: {sizes.shard} ({sizes.reason}): {'; also: '.join(errors)}")
    return sizes


def check_sequence(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Checks ``parallel.sequence`` against the model's heads, from its config alone.

    Raises:
        UserError: a size that the model cannot take, with those that it can.
    """
    size = recipe.parallel.sequence
    if size != "auto":
        try:
            check_sequence_size(config, size)
        except UserError as error:
            raise UserError(f"parallel.{error}") from error


def _sequences(recipe: Recipe, config: PreTrainedConfig) -> list[int]:
    """What ``auto`` may take: sizes by the model's heads that divide the tokens of a pack."""
    whole = recipe.packing.tokens_per_batch
    return [size for size in sequence_sizes(config) if whole % size == 0]


def mesh_of(sizes: Sizes, arguments: TrainingArguments) -> Mesh:
    """This process among them."""
    return Mesh.of(arguments, shard=sizes.shard, sequence=sizes.sequence)


def sizes_lines(sizes: Sizes) -> list[str]:
    """What is said of several processes; nothing of one."""
    if sizes.processes == 1:
        return []
    lines = [f"parallel: replicate {sizes.replicate}, shard {sizes.shard} ({sizes.reason})"]
    if sizes.sequence > 1:
        why = f" ({sizes.sequence_reason})" if sizes.sequence_reason else ""
        data_ranks = counted(sizes.processes // sizes.sequence, "data rank")
        lines.append(f"parallel: sequence {sizes.sequence}{why}: {data_ranks}")
    return lines


def shard_by_recipe(recipe: Recipe, loaded: LoadedModel, mesh: Mesh, arguments: TrainingArguments) -> None:
    """Shards a prepared model as ``training.bf16`` says and fills it; nothing where every process keeps whole weights.

    Raises:
        UserError: weights of several dtypes that train together, or that cannot be read; on every rank.
    """
    if mesh.shard_size == 1:
        return
    try:
        dtype = autocast_dtype(recipe.training)
        shard_model(loaded.model, mesh.weights_mesh(arguments.device.type), param_dtype=dtype)
    except ValueError as error:
        raise UserError(f"parallel.shard: {error}") from error
    with phase("sharding the model"):
        try:
            fill(loaded.model, loaded.pieces, arguments.device)
        except ValueError as error:
            raise UserError(f"cannot load model {recipe.model.name_or_path}: {one_line(error)}") from error
        gc.collect()  # what the weights came from, on rank 0
    set_seed(arguments.seed)  # rank 0 drew the adapters, and dropout begins alike on all ranks
