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
from deltatune.parallel.experts import check_expert_ranks, check_expert_size, divide_experts, expert_sizes
from deltatune.parallel.filling import fill
from deltatune.parallel.heads import sequence_sizes
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sharding import shard_model
from deltatune.parallel.sizes import Sizes, choose_sizes
from deltatune.parallel.state import SHARDS, Parts
from deltatune.phases import phase
from deltatune.quantization.tensor import QuantizedTensor
from deltatune.training.arguments import autocast_dtype
from deltatune.training.checkpoint import empty_model
from deltatune.training.loading import LoadedModel
from deltatune.training.pack_ranks import check_sequence
from deltatune.training.planned import estimate_step, expert_split, prepare_by_recipe

__all__ = ["check_experts", "mesh_of", "shard_by_recipe", "sizes_lines", "sizes_of"]

#: What a step may take of a device, beside what is not estimated.
_ROOM = 0.9

#: Why ``auto`` divides no experts.
_NO_EXPERTS = "auto divides none: shards hold what does not fit, without a room for tokens that a run may exceed"


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
    given, split = recipe.parallel, expert_split(recipe)
    count = arguments.world_size if processes is None else processes
    check_sequence(recipe, model.config)
    check_experts(recipe, count, model)
    numbers = [None if size == "auto" else int(size) for size in (given.replicate, given.shard, given.sequence)]
    available = device_memory(arguments.device) * _ROOM
    checkpointing = "layer" if recipe.checkpointing == "auto" else recipe.checkpointing
    prepared: list[object] = []
    few_bits = any(isinstance(weight, QuantizedTensor) for weight in model.parameters())
    errors = list(sharding_errors(recipe, few_bits=few_bits))
    if errors and split.ranks > 1:
        raise UserError(f"parallel.expert: {split.ranks}: {'; also: '.join(errors)}")

    def fits(shard: int, sequence: int) -> bool:
        if shard > 1 and errors:
            return False
        if not prepared:
            prepared.append(prepare_by_recipe(recipe, model, device=arguments.device))
        return estimate_step(recipe, model, checkpointing, shard=shard, sequence=sequence).total <= available

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
        start = "" if count > 1 else "; start several with deltatune train RECIPE --nproc N, or torchrun"
        raise UserError(f"parallel.{error}{start}") from error
    if sizes.shard > 1 and errors:
        raise UserError(f"parallel.shard: {sizes.shard} ({sizes.reason}): {'; also: '.join(errors)}")
    return sizes._replace(expert=split.ranks)


def check_experts(recipe: Recipe, processes: int, model: nn.Module | None = None) -> None:
    """Checks ``parallel.expert`` against the model's experts and the number of processes, before any has met another.

    Args:
        recipe: the run.
        processes: those that it has.
        model: of the recipe, on any device; made on the meta device by default.

    Raises:
        UserError: a model without experts that can be divided, or a size that divides no layer's or these processes.
    """
    split = expert_split(recipe)
    if split.ranks == 1:
        return
    model = empty_model(recipe.model) if model is None else model
    try:
        check_expert_size(model, *split)
        check_expert_ranks(model, split.ranks, processes)
    except ValueError as error:
        start = "" if processes > 1 else "; start several with deltatune train RECIPE --nproc N"
        raise UserError(f"parallel.{error}{start if split.ranks in expert_sizes(model) else ''}") from error


def _sequences(recipe: Recipe, config: PreTrainedConfig) -> list[int]:
    """What ``auto`` may take: sizes by the model's heads that divide the tokens of a pack."""
    whole = recipe.packing.tokens_per_batch
    return [size for size in sequence_sizes(config, recipe.parallel.recurrent) if whole % size == 0]


def mesh_of(sizes: Sizes, arguments: TrainingArguments) -> Mesh:
    """This process among them."""
    return Mesh.of(arguments, shard=sizes.shard, sequence=sizes.sequence, expert=sizes.expert)


def sizes_lines(recipe: Recipe, sizes: Sizes) -> list[str]:
    """What is said of several processes; of one, what does nothing there."""
    by_state = recipe.parallel.recurrent == "state"
    idle = ["parallel: sequence 1, so recurrent: state does nothing"] if by_state and sizes.sequence == 1 else []
    if sizes.processes == 1:
        return idle
    lines = [f"parallel: replicate {sizes.replicate}, shard {sizes.shard} ({sizes.reason})"]
    if sizes.sequence > 1:
        why = f" ({sizes.sequence_reason})" if sizes.sequence_reason else ""
        data_ranks = counted(sizes.processes // sizes.sequence, "data rank")
        how = ", recurrent layers by state" if by_state else ""
        lines.append(f"parallel: sequence {sizes.sequence}{why}{how}: {data_ranks}")
    if sizes.expert > 1:
        room = f"room for {recipe.parallel.expert_capacity:g} times an even share of visits"
        lines.append(f"parallel: expert {sizes.expert}: a process holds 1/{sizes.expert} of the experts, with {room}")
    elif recipe.parallel.expert == "auto":
        lines.append(f"parallel: expert 1 ({_NO_EXPERTS})")
    return lines + idle


def shard_by_recipe(recipe: Recipe, loaded: LoadedModel, mesh: Mesh, arguments: TrainingArguments) -> Parts:
    """Divides a prepared model among the ranks, with the dtypes of ``training.bf16``, and fills it.

    Nothing is done where every process keeps whole weights.

    Returns:
        How its weights lie on ranks.

    Raises:
        UserError: weights of several dtypes that train together, or that cannot be read; on every rank.
    """
    if not mesh.holds_parts:
        return SHARDS
    parts = _divided(recipe, loaded.model, mesh, arguments)
    with phase("sharding the model" if mesh.shard_size > 1 else "dividing the experts"):
        try:
            fill(loaded.model, loaded.pieces, arguments.device, parts)
        except ValueError as error:
            raise UserError(f"cannot load model {recipe.model.name_or_path}: {one_line(error)}") from error
        gc.collect()  # what the weights came from, on rank 0
    set_seed(arguments.seed)  # rank 0 drew the adapters, and dropout begins alike on all ranks
    return parts


def _divided(recipe: Recipe, model: nn.Module, mesh: Mesh, arguments: TrainingArguments) -> Parts:
    """The experts, and all other weights in shards where there are some."""
    device = arguments.device
    # without shards autocast computes with weights as they are
    dtype = autocast_dtype(recipe.training) if mesh.shard_size > 1 else None
    parts, beside = SHARDS, frozenset[nn.Parameter]()
    if mesh.expert_size > 1:
        capacity = recipe.parallel.expert_capacity
        experts = divide_experts(model, mesh, capacity=capacity, dtype=dtype, device=device)
        parts, beside = experts, frozenset(experts.parameters)
    if mesh.shard_size > 1:
        try:
            shard_model(model, mesh.weights_mesh(device.type), param_dtype=dtype, beside=beside)
        except ValueError as error:
            raise UserError(f"parallel.shard: {error}") from error
    return parts
