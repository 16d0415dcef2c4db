"""An adapter in its base model, as PEFT computes it, and added to the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, one_line
from deltatune.hf import model as hf_model
from deltatune.phases import phase
from deltatune.training.adapter_files import adapter_config, adapter_weights
from deltatune.training.checkpoint import Loaded, empty_model, load_checkpoint, model_class
from deltatune.training.expert_adapters import refuse_old_roles

__all__ = ["Adapter", "load_adapted", "merge", "refuse_lost_base"]

_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, its config, and the base model that it names."""

    folder: Path
    config: dict[str, Any]

    @property
    def base(self) -> str | None:
        """The base model: a folder or a name on the Hub."""
        found = self.config.get("base_model_name_or_path")
        return None if found is None else str(found)

    @property
    def revision(self) -> str | None:
        """The base model's, on the Hub."""
        found = self.config.get("revision")
        return None if found is None else str(found)

    @property
    def base_class(self) -> str | None:
        """Name of the class that the adapter was trained on, where it says."""
        found = (self.config.get("auto_mapping") or {}).get("base_model_class")
        return None if found is None else str(found)


def refuse_lost_base(adapter: Adapter) -> None:
    """Refuses an adapter whose base weights were changed in a way that nothing in its files says.

    Raises:
        UserError: an initialisation by a random decomposition, by data, or by quantised weights.
    """
    init = str(adapter.config.get("init_lora_weights"))
    if re.match(r"pissa_niter|corda|loftq|lora_ga", init):
        raise UserError(
            f"{adapter.folder} was trained on base weights that {init} changed, and does not say how; save it again "
            "with PEFT's path_initial_model_for_weight_conversion, where that run's initial adapter is still there"
        )


def load_adapted(section: ModelSection, config: PreTrainedConfig, adapter: Adapter) -> tuple[Any, Loaded, Any]:
    """The base model with the adapter around its layers, as PEFT has it; the base as it was loaded, and by which class.

    Raises:
        UserError: an adapter that is not added to weights; tensors of it that have no place in the base, or places for
            which it has none.
    """
    given = adapter_config(adapter.folder)
    given.inference_mode = True
    if given.is_prompt_learning:
        raise UserError(f"{adapter.folder} holds virtual tokens ({given.peft_type.value}), which no weight takes up")
    state = adapter_weights(adapter.folder)
    loader = _loader(section, config, adapter, state)
    loaded = load_checkpoint(section, config, loader=loader, in_few_bits=False)
    refuse_old_roles(state, adapter.config, loaded.model, adapter.folder)
    _resize(loaded.model, state, given)
    try:
        with warnings.catch_warnings():
            # what PEFT says of tied weights, this module sees to
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            with phase("adding the adapter"):
                adapted = peft.PeftModel(loaded.model, given)
                result = adapted.load_adapter(str(adapter.folder), "default")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter.folder} does not fit its base model: {one_line(error)[:300]}") from error
    for what, names in (("lacks", result.missing_keys), ("has no place for", result.unexpected_keys)):
        if names:
            subject = "it" if what == "lacks" else f"{type(loaded.model).__name__} of {section.name_or_path}"
            raise UserError(
                f"{adapter.folder} does not fit its base model: {subject} {what} {len(names)} tensors, such as "
                f"{sorted(names)[0]}; pass the model that it was trained on with --base"
            )
    return adapted.eval(), loaded, loader


def merge(adapted: Any) -> nn.Module:
    """The base model with the adapter in its weights; head and embedding are untied where it is around one of them."""
    base = hf_model.base_model(adapted)
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    weights: list[Any] = [getattr(_inside(module), "weight", None) for module in ends]
    tied = weights[0] is not None and weights[0] is weights[1]
    # rows that train are the same ones in both
    by_rows = any(getattr(config, "trainable_token_indices", None) for config in adapted.peft_config.values())
    if tied and not by_rows and any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in ends):
        # what is added to one must not reach the other
        _inside(ends[1]).weight = nn.Parameter(weights[1].detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    with torch.no_grad():
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged


def _inside(module: Any) -> Any:
    """The module that PEFT wrapped."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def _loader(section: ModelSection, config: PreTrainedConfig, adapter: Adapter, state: Iterable[str]) -> Any:
    """The class that has the modules which the adapter is around.

    The one that the adapter names; else the checkpoint's own or, as PEFT and TRL load it, AutoModelForCausalLM's.
    """
    own, auto = model_class(config), transformers.AutoModelForCausalLM
    if own is auto or own.__name__ == adapter.base_class or section.trust_remote_code:
        return own
    paths = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in state}
    fits = [sum(path in names for path in paths) for names in _names(section, config, (own, auto))]
    return auto if fits[1] > fits[0] else own


def _names(section: ModelSection, config: PreTrainedConfig, loaders: Iterable[Any]) -> Iterator[set[str]]:
    for loader in loaders:
        model = empty_model(section, config, loader=loader)
        yield {name for name, _ in (*model.named_modules(), *model.named_parameters())}


def _resize(model: Any, state: dict[str, Tensor], config: Any) -> None:
    """Makes room for tokens that were added with the adapter."""
    embedding = model.get_input_embeddings()
    trained = getattr(config, "trainable_token_indices", None) or []
    places = trained.values() if isinstance(trained, dict) else [trained]
    ids, rows_here = {index for ids in places for index in ids}, embedding.weight.shape[0]
    added = {index for index in ids if index >= rows_here}
    if added and max(added) >= rows_here + len(added):
        gap = min(set(range(rows_here, rows_here + len(added) + 1)) - added)
        raise UserError(
            f"the adapter trains the row of token {max(added)}, its base has {rows_here} rows, and nobody says what "
            f"row {gap} holds; pass the model that it was trained on with --base"
        )
    if added:
        model.resize_token_embeddings(max(added) + 1)
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = state.get(f"{_PREFIX}{name}.weight", state.get(f"{_PREFIX}{name}.base_layer.weight"))
    if rows is not None and rows.shape[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows.shape[0])
