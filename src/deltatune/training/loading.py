"""The model of a run, with its adapters: whole on every process, or on none, its weights read a module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from deltatune.config.schema import Recipe
from deltatune.errors import UserError, first_line, user_path
from deltatune.hf import model as hf_model
from deltatune.hf.reading import NotInPiecesError
from deltatune.parallel.filling import Piece, from_rank_0, tensors_of
from deltatune.parallel.mesh import Mesh
from deltatune.phases import phase
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.checkpoint import commit_of, describe_checkpoint, empty_model, load_checkpoint
from deltatune.training.continuing import load_adapter
from deltatune.training.kept import has_weight_files
from deltatune.training.saving import Origin
from deltatune.training.starts import first_factors, reads_base
from deltatune.training.unread import Unread, in_turn

__all__ = ["LoadedModel", "host_lines", "load_by_recipe"]


@dataclass(frozen=True)
class LoadedModel:
    """What will train."""

    model: nn.Module  # on the meta device where ranks will hold parts of its weights
    origin: Origin
    pieces: Iterator[Piece] | None = None  # on rank 0, the weights of one on the meta device, once
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """The model that one process would train, and its weights."""

    model: nn.Module
    origin: Origin
    pieces: Iterator[Piece]
    said: tuple[str, ...] = ()


def load_by_recipe(
    recipe: Recipe, config: PreTrainedConfig, mesh: Mesh, device: torch.device | None = None
) -> LoadedModel:
    """Loads and adapts the model; where it will be divided, rank 0 finds its weights, and the others learn what it is.

    Args:
        recipe: the run.
        config: the checkpoint's.
        mesh: the processes.
        device: where weights of 16 bits are made into few; the CPU by default.

    Raises:
        UserError: weights that cannot be read or adapted; on every rank.
    """
    if not mesh.holds_parts:
        return _whole(recipe, config, device)
    source: _Source | None = None
    about: Any = None
    if dist.get_rank() == 0:
        try:
            source = _source(recipe, config)
            about = _about(source)
        except UserError as error:
            about = str(error)
    about = from_rank_0(about)
    if isinstance(about, str):
        raise UserError(about)
    model = adapt_by_recipe(empty_model(recipe.model, config), recipe, revision=commit_of(recipe.model))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(about["dtypes"][name])
    if source is None:
        return LoadedModel(model, Origin(recipe.model, about["unexpected"], about["first"]))
    # what is saved beside the weights, and the names that the weights had
    ours, theirs = hf_model.base_model(model), hf_model.base_model(source.model)
    ours.generation_config, ours._weight_conversions = theirs.generation_config, theirs._weight_conversions
    configs: Any = getattr(model, "peft_config", {})
    for adapter, settings in cast("Any", getattr(source.model, "peft_config", {})).items():
        configs[adapter].init_lora_weights = settings.init_lora_weights
    return LoadedModel(model, source.origin, source.pieces, source.said)


def host_lines(recipe: Recipe, model: nn.Module) -> list[str]:
    """What loading takes of the host's memory where ranks will hold parts of weights, as far as it is known before.

    Args:
        recipe: the run.
        model: with its adapters, on the meta device.
    """
    why = _why_whole(recipe, hf_model.base_model(model).config)
    return [] if why is None else [_whole_line(model, why)]


def _whole_line(model: nn.Module, why: str) -> str:
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    return f"rank 0 loads the whole model into host memory, {size / 2**30:.1f} GiB: {why}"


def _why_whole(recipe: Recipe, config: PreTrainedConfig) -> str | None:
    """Why weights must all be there before the model is adapted; None where they need not, or nobody knows yet."""
    lora, folder = recipe.lora, user_path(recipe.model.name_or_path)
    if lora is not None and reads_base(lora.init_lora_weights):
        return f"lora.init_lora_weights: {lora.init_lora_weights} takes its weights apart"
    if lora is not None and lora.use_dora:
        return "lora.use_dora takes the norms of its weights"
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantised"
    if folder.is_dir() and not has_weight_files(folder):
        return "its weights are no safetensors"
    return None


def _source(recipe: Recipe, config: PreTrainedConfig) -> _Source:
    """The model that one process would train: its weights unread where that can be."""
    random = torch.get_rng_state()
    try:
        if (why := _why_whole(recipe, config)) is not None:
            raise NotInPiecesError(why)
        return _unread(recipe, config)
    except NotInPiecesError as error:
        torch.set_rng_state(random)
        loaded = _whole(recipe, config)
        said = (_whole_line(loaded.model, str(error)),)
        return _Source(loaded.model, loaded.origin, in_turn(tensors_of(loaded.model)), said)


def _unread(recipe: Recipe, config: PreTrainedConfig) -> _Source:
    lora, section = recipe.lora, recipe.model
    # rows that are added are drawn like those that are there, and rows that train begin as they are
    grows = section.added_tokens is not None or (lora is not None and lora.name_or_path is not None)
    loaded, pieces = describe_checkpoint(section, config, keep=_vocabulary if grows else lambda _: set())
    unread = Unread(loaded.model, pieces)
    try:
        model = adapt_by_recipe(loaded.model, recipe, revision=commit_of(section))
        load_adapter(model, lora)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # what looks at numbers finds stand-ins; what is wrong in any case is said again with the weights there
        raise NotInPiecesError(f"it cannot be adapted before they are read ({first_line(error)})") from error
    tensors = tensors_of(model)
    unread.check(model, tensors)
    return _Source(model, Origin(section, loaded.unexpected), unread.weights(model, tensors))


def _vocabulary(model: Any) -> set[str]:
    """Names of the weights that have a row for each token."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(weight) for module in modules if module is not None for weight in module.parameters()}
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in weights}


def _whole(recipe: Recipe, config: PreTrainedConfig, device: torch.device | None = None) -> LoadedModel:
    loaded = load_checkpoint(recipe.model, config, device=device)
    with phase("adapting the model"):
        model = adapt_by_recipe(loaded.model, recipe, revision=commit_of(recipe.model))
        load_adapter(model, recipe.lora)
    return LoadedModel(model, Origin(recipe.model, loaded.unexpected, first_factors(model)))


def _about(source: _Source) -> dict[str, Any]:
    dtypes = {name: parameter.dtype for name, parameter in source.model.named_parameters()}
    return {"dtypes": dtypes, "unexpected": source.origin.unexpected, "first": source.origin.first}
