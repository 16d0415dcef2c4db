"""An adapter that training goes on from: found, held against the recipe and the model, and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import snapshot_download
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from deltatune.config.defaults import differs
from deltatune.config.schema import LoraSection
from deltatune.errors import UserError, first_line, near_files, one_line, user_path
from deltatune.training.adapter_files import adapter_digest, adapter_weights
from deltatune.training.adapter_settings import adapter_settings, start_settings
from deltatune.training.expert_adapters import refuse_old_roles
from deltatune.training.hub import silence

__all__ = ["adapter_record", "continued", "load_adapter", "start_lines"]

_KEY = "lora.name_or_path"
#: Of the recipe; everything else is the adapter's.
_OF_THE_RECIPE = ("name_or_path", "lora_dropout", "adapter_dtype", "impl")
#: Initialisations that change the base weights, which a file of PEFT's own does not hold.


def continued(model: nn.Module, section: LoraSection, new_tokens: Sequence[int] = ()) -> nn.Module:
    """The model with adapters as those of ``section.name_or_path`` are, not yet with their weights.

    Raises:
        UserError: no LoRA adapter there, one of another base model or of changed base weights, a setting of the recipe
            that it contradicts, or rows of ``new_tokens`` that it does not train.
    """
    name = str(section.name_or_path)
    config = _config(name)
    _check_settings(name, config, section)
    _check_base(name, config, model)
    _check_room(name, config, model)
    config.lora_dropout, config.inference_mode = section.lora_dropout, False
    try:
        adapted: nn.Module = peft.get_peft_model(
            model, config, autocast_adapter_dtype=section.adapter_dtype == "float32"
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{_KEY}: {name} does not fit the model: {one_line(error)}") from error
    if new_tokens and not _trains_rows(adapted, config, new_tokens):
        raise UserError(
            f"model.added_tokens would not train: the adapter of {name} has no rows for them; leave them out, or start "
            "a new adapter without lora.name_or_path"
        )
    return adapted


def _check_room(name: str, config: peft.LoraConfig, model: Any) -> None:
    last = max((index for group in _rows(config) for index in group), default=-1)
    count = model.get_input_embeddings().weight.shape[0]
    if last >= count:
        raise UserError(
            f"{_KEY}: {name} trains rows of tokens up to {last}, and the model has {count}; give model.added_tokens as "
            f"the run before did, or model.tokenizer: {name}"
        )


def _rows(config: peft.LoraConfig) -> list[list[int]]:
    """Rows that train, of each module that has such."""
    rows = config.trainable_token_indices or []
    return [group for group in (rows.values() if isinstance(rows, dict) else [rows]) if group]


def _trains_rows(adapted: Any, config: peft.LoraConfig, tokens: Sequence[int]) -> bool:
    """Whether rows of the embedding train: as rows, or since all of it does."""
    if groups := _rows(config):
        return all(set(tokens) <= set(group) for group in groups)
    return any(parameter.requires_grad for parameter in adapted.get_input_embeddings().parameters())


def load_adapter(model: nn.Module, section: LoraSection | None) -> None:
    """Puts the weights of ``section.name_or_path`` into its adapters, every one of them; nothing without one.

    On the meta device names and shapes are checked alone.

    Raises:
        UserError: weights that are missing, that have no place, or that have other shapes.
    """
    if section is None or section.name_or_path is None:
        return
    name = section.name_or_path
    folder = _folder(name)
    weights = adapter_weights(folder)
    refuse_old_roles(weights, adapter_settings(folder), model, folder)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT saves embeddings as well that are adapted, or were resized
    known = get_peft_model_state_dict(model, save_embedding_layers=True).keys() | model.state_dict().keys()
    for words, names in (
        ("lacks {} of the weights that its configuration says", sorted(expected.keys() - weights.keys())),
        ("holds {} weights that have no place in the model", sorted(weights.keys() - known)),
    ):
        if names:
            raise UserError(f"{_KEY}: {name} {words.format(len(names))}, such as {names[0]}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*meta parameter.*")
            set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"{_KEY}: {name} does not fit the model: {_mismatch(error)}") from error


def start_lines(section: LoraSection | None) -> list[str]:
    """What adapters begin as, where it is another's end."""
    if section is None or section.name_or_path is None:
        return []
    return [f"adapters begin as those of {section.name_or_path}"]


def adapter_record(section: LoraSection | None) -> dict[str, str]:
    """What a run's record keeps of the adapter that it began with: its name and the digest of its weights."""
    if section is None or section.name_or_path is None:
        return {}
    return {"name_or_path": section.name_or_path, "sha256": adapter_digest(_folder(section.name_or_path))}


def _folder(name: str) -> Path:
    """The folder of an adapter; one on the Hub is downloaded, or found among what was."""
    path = user_path(name)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(f"{_KEY}: {name} is no folder; expected an adapter's{near_files(path)}")
    silent = silence()
    try:
        found = snapshot_download(name, allow_patterns="adapter_*", local_files_only=silent is not None)
    except (OSError, ValueError) as error:
        why = f"it is not on this machine, and {silent}" if silent else first_line(error)
        raise UserError(f"{_KEY}: cannot read {name}: {why}; check the name, or give a folder") from error
    return Path(found)


def _config(name: str) -> peft.LoraConfig:
    folder = _folder(name)
    start_settings(name, folder)  # before PEFT asks for packages that some starts need
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise UserError(f"{_KEY}: {name}: its adapter_config.json cannot be read: {one_line(error)}") from error
    assert isinstance(config, peft.LoraConfig)
    return config


def _check_settings(name: str, config: peft.LoraConfig, section: LoraSection) -> None:
    for key in type(section).model_fields:
        if key in _OF_THE_RECIPE or not differs(section, key):
            continue
        given, saved = getattr(section, key), getattr(config, key)
        if _plain(given) != _plain(saved):
            raise UserError(
                f"lora.{key}: {_plain(given)} cannot act on the adapter of {name}, which has {_plain(saved)}; leave it "
                "out, or start a new adapter without lora.name_or_path"
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple | list | set) else value


def _check_base(name: str, config: peft.LoraConfig, model: nn.Module) -> None:
    """Two folders, or two names on the Hub, tell; of a folder and a name nobody knows, and the shapes must do."""
    trained_on, here = config.base_model_name_or_path, getattr(model.config, "_name_or_path", "")
    if not trained_on or not here:
        return
    first, second = user_path(trained_on), user_path(here)
    if first.exists() != second.exists() or first.is_absolute() != second.is_absolute():
        return
    same = first.resolve() == second.resolve() if first.exists() else trained_on == here
    if not same:
        raise UserError(
            f"{_KEY}: {name} was trained on {trained_on}, and model.name_or_path is {here}; name that model, or, if "
            "both are the same, change base_model_name_or_path in its adapter_config.json"
        )


def _mismatch(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return lines[0] if lines else first_line(error)
