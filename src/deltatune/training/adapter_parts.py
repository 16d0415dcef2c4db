"""Which names of a model are saved with it, and an adapter's file into a model of which ranks hold parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.parallel.state import SHARDS, Parts, copy_parts

__all__ = ["load_adapter_parts", "saved_names", "saves_rows_alone", "set_adapter"]


def saves_rows_alone(model: nn.Module) -> bool:
    """Whether an adapter holds all that trains of the embedding itself."""
    embedding: Any = getattr(hf_model.base_model(model), "get_input_embeddings", lambda: None)()
    return isinstance(embedding, AuxiliaryTrainingWrapper)


def saved_names(model: nn.Module) -> set[str]:
    """The names in ``model.state_dict()`` that ``save_pretrained`` writes: all, or an adapter's."""
    return {*_adapter_names(model).values()} if hasattr(model, "peft_config") else {*model.state_dict(keep_vars=True)}


def load_adapter_parts(model: nn.Module, folder: Path, parts: Parts) -> None:
    """Takes up the adapter of a folder; every rank reads its file.

    Raises:
        UserError: an adapter of other names or shapes.
    """
    try:
        set_adapter(model, load_peft_weights(str(folder), device="cpu"), parts)
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder} holds no adapter of this model: {error}") from error


def set_adapter(model: nn.Module, state: Mapping[str, Tensor], parts: Parts = SHARDS) -> None:
    """Puts an adapter's tensors, by their names in a file, into a model, divided or not."""
    if not hf_model.is_sharded(model):
        set_peft_model_state_dict(model, dict(state))
        return
    names = _adapter_names(model)
    if names.keys() != state.keys():
        raise KeyError(sorted(names.keys() ^ state.keys())[0])
    copy_parts(model, {names[key]: tensor for key, tensor in state.items()}, parts)


def _adapter_names(model: nn.Module) -> dict[str, str]:
    """Name in an adapter's file -> name in the model; PEFT renames numbers in place of the tensors."""
    names = list(model.state_dict(keep_vars=True))
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    whole = False if saves_rows_alone(model) else "auto"
    found = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=whole)
    return {key: names[int(number)] for key, number in found.items()}
