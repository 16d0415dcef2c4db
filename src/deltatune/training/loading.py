"""The model of a run, with its adapters: whole on every process, or whole on rank 0 alone and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from deltatune.config.schema import Recipe
from deltatune.hf import model as hf_model
from deltatune.parallel.filling import from_rank_0, tensors_of
from deltatune.parallel.mesh import Mesh
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.checkpoint import commit_of, empty_model, load_checkpoint
from deltatune.training.continuing import load_adapter
from deltatune.training.saving import Origin
from deltatune.training.starts import first_factors

__all__ = ["LoadedModel", "load_by_recipe"]


@dataclass(frozen=True)
class LoadedModel:
    """What will train."""

    model: nn.Module  # on the meta device where its weights will be sharded
    origin: Origin
    whole: dict[str, Tensor] = field(default_factory=dict)  # on rank 0, the weights of one on the meta device


def load_by_recipe(recipe: Recipe, config: PreTrainedConfig, mesh: Mesh) -> LoadedModel:
    """Loads and adapts the model; where it will be sharded, rank 0 alone, and the others learn what it found.

    Raises:
        UserError: weights that cannot be read or adapted.
    """
    if mesh.shard_size == 1:
        return _whole(recipe, config)
    source = _whole(recipe, config) if mesh.data_rank == 0 else None
    about = from_rank_0(None if source is None else _about(source))
    model = adapt_by_recipe(empty_model(recipe.model, config), recipe, revision=commit_of(recipe.model))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(about["dtypes"][name])
    if source is None:
        return LoadedModel(model, Origin(recipe.model, about["unexpected"], about["first"]))
    # what is saved beside the weights
    hf_model.base_model(model).generation_config = hf_model.base_model(source.model).generation_config
    configs: Any = getattr(model, "peft_config", {})
    for adapter, settings in cast("Any", getattr(source.model, "peft_config", {})).items():
        configs[adapter].init_lora_weights = settings.init_lora_weights
    return LoadedModel(model, source.origin, tensors_of(source.model))


def _whole(recipe: Recipe, config: PreTrainedConfig) -> LoadedModel:
    loaded = load_checkpoint(recipe.model, config)
    model = adapt_by_recipe(loaded.model, recipe, revision=commit_of(recipe.model))
    load_adapter(model, recipe.lora)
    return LoadedModel(model, Origin(recipe.model, loaded.unexpected, first_factors(model)))


def _about(source: LoadedModel) -> dict[str, Any]:
    dtypes = {name: parameter.dtype for name, parameter in source.model.named_parameters()}
    return {"dtypes": dtypes, "unexpected": source.origin.unexpected, "first": source.origin.first}
