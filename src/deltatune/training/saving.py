"""Writing a trained or merged model into a folder, with everything of its base that travels with it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deltatune.config.schema import ModelSection
from deltatune.errors import one_line
from deltatune.hf import model as hf_model
from deltatune.subclass import stock_class
from deltatune.training.adapter_parts import saves_rows_alone
from deltatune.training.checkpoint import folder_of
from deltatune.training.companions import BESIDE_WEIGHTS, copy_generation_config, copy_processors, write_tokenizer
from deltatune.training.disk import has_filled
from deltatune.training.kept import add_tensors, not_loaded, other_dtypes, weight_files
from deltatune.training.starts import make_plain

__all__ = ["Origin", "trained_rows_alone", "write_merged", "write_trained"]


@dataclass(frozen=True)
class Origin:
    """What a trained model came from, as far as it travels with it."""

    section: ModelSection  # the checkpoint, its revision and its tokenizer
    unexpected: frozenset[str] = frozenset()  # tensors of the checkpoint that its class neither has nor leaves out
    first: dict[str, Tensor] | None = None  # the factors of adapters that began inside the base weights


@contextmanager
def trained_rows_alone(model: nn.Module) -> Iterator[None]:
    """Makes ``save_pretrained`` write what trains of embedding and head; PEFT would add all of one that has grown."""
    if not saves_rows_alone(model):
        yield
        return
    save = cast("Any", model).save_pretrained
    vars(model)["save_pretrained"] = partial(save, save_embedding_layers=False)
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def write_trained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    origin: Origin | None,
    state: Mapping[str, Tensor] | None = None,
    weights: Callable[[Path], list[str]] | None = None,
) -> list[str]:
    """Writes the adapter of a PEFT model, or the whole model; returns what should be said of what is beside it.

    ``state``: its tensors, where the model holds parts of them alone; or ``weights``, which writes them. What cannot be
    had of the base any more is named: it must not cost what was trained.
    """
    given = {} if weights is not None else state
    with trained_rows_alone(model):
        cast("Any", model).save_pretrained(str(folder), state_dict=None if given is None else dict(given))
    said = [] if weights is None else weights(folder)
    return said + _write_beside(model, tokenizer, folder, origin)


def _write_beside(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path, origin: Origin | None
) -> list[str]:
    if origin is None:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return []
    if origin.first is not None:
        make_plain(folder, origin.first)
    try:
        return _add_origin(model, tokenizer, folder, origin)
    except (OSError, SafetensorError) as error:
        if has_filled(folder, error):
            raise
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return [f"files of {origin.section.name_or_path} that belong beside the model are missing: {one_line(error)}"]


def _add_origin(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path, origin: Origin) -> list[str]:
    section = origin.section
    if tokenizer is not None:
        named = section.tokenizer or section.name_or_path
        source = folder_of(section, named, BESIDE_WEIGHTS)
        write_tokenizer(tokenizer, [source], folder, trust_remote_code=section.trust_remote_code)
    base = folder_of(section, section.name_or_path, BESIDE_WEIGHTS)
    copy_processors(base, folder)
    if hasattr(model, "peft_config"):
        generation: Any = getattr(hf_model.base_model(model), "generation_config", None)
        if generation is not None and (base / "generation_config.json").is_file():
            generation.save_pretrained(str(folder))
    copy_generation_config(base, folder)
    return [] if hasattr(model, "peft_config") else _keep(base, folder, model, origin.unexpected)


def write_merged(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    origin: Origin,
    config: PreTrainedConfig,
    adapter: Path,
) -> list[str]:
    """Writes a base model with other weights; returns what should be said of tensors that its class does not load.

    ``config`` is the base's: the one of a text model alone would not fit the other tensors.
    """
    section = origin.section
    model.save_pretrained(str(folder))
    if not isinstance(model.config, type(config)):
        _whole_config(config, model.config).save_pretrained(str(folder))
    base = folder_of(section, section.name_or_path, BESIDE_WEIGHTS)
    said = _keep(base, folder, model, origin.unexpected)
    if section.dtype == "auto" and (others := other_dtypes(base, folder)):
        add_tensors(base, others, folder)
    copy_processors(base, folder)
    copy_generation_config(base, folder)
    if (adapter / "generation_config.json").is_file():
        shutil.copyfile(adapter / "generation_config.json", folder / "generation_config.json")
    write_tokenizer(tokenizer, [base, adapter], folder, trust_remote_code=section.trust_remote_code)
    return said


def _whole_config(config: PreTrainedConfig, text: PreTrainedConfig) -> Any:
    whole: Any = copy.deepcopy(config)
    for one in (whole, whole.get_text_config()):
        one.tie_word_embeddings, one.dtype = text.tie_word_embeddings, text.dtype
    whole.get_text_config().vocab_size = text.vocab_size
    return whole


def _keep(base: Path, folder: Path, model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    name = stock_class(hf_model.base_model(model)).__name__
    if not weight_files(base):
        return [f"the base's weights are no safetensors: tensors that {name} does not load are not kept"]
    names = not_loaded(base, folder, model, unexpected)
    if not names:
        return []
    add_tensors(base, names, folder)
    return [f"{len(names)} tensors that {name} does not load, such as {names[0]}, are kept as they were in the base"]
