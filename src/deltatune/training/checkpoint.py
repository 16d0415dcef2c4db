"""Checkpoints on disk: told from other folders, loaded as the class they were saved from, with nothing missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from deltatune.config.schema import ModelSection
from deltatune.data.well_known import read_template
from deltatune.errors import UserError, first_line, near_files, user_path
from deltatune.hf.generation import keep_settings
from deltatune.phases import phase
from deltatune.quantization.released import is_component
from deltatune.training.hub import silence
from deltatune.training.preflight import check_model_path, check_model_type, check_tokenizer_path
from deltatune.training.quantized_base import QuantizedBase, quantized_base
from deltatune.training.tokens import add_tokens

if TYPE_CHECKING:  # they import every op
    from deltatune.hf.reading import Pieces
    from deltatune.quantization.tensor import QuantizedTensor

__all__ = [
    "Loaded",
    "commit_of",
    "describe_checkpoint",
    "empty_model",
    "folder_of",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_class",
    "new_model",
    "origin_of",
]

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration")


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The configuration of a checkpoint folder, or of a model on the Hub.

    Where the Hub does not answer, a model on it is read from what was downloaded before, at once or not at all; so are
    its weights and its tokenizer.

    Raises:
        UserError: a folder that holds no checkpoint, a name that cannot be found, or an unknown model type.
    """
    check_model_path(section)
    check_model_type(section)
    path = user_path(section.name_or_path)
    try:
        return AutoConfig.from_pretrained(**origin_of(section, section.name_or_path))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        why = _why(error, section.name_or_path)
        raise UserError(f"cannot read model {section.name_or_path}: {why}{_no_folder(path)}") from error


def model_class(config: PreTrainedConfig) -> Any:
    """The class a checkpoint was saved from, so that its parameter names stay those of the checkpoint.

    Raises:
        UserError: an architecture that is no causal language model.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and name.endswith(_SUFFIXES):
            return found
        if found is not None:
            raise UserError(f"model class {name} has no language-model head; expected one of *{_SUFFIXES[0]}")
    return transformers.AutoModelForCausalLM


@dataclass(frozen=True)
class Loaded:
    """A model, and the names of tensors in its checkpoint that its class neither has nor declares to leave out."""

    model: nn.Module
    unexpected: frozenset[str]


def _nothing(_: Any) -> set[str]:
    return set()


def load_model(section: ModelSection, config: PreTrainedConfig | None = None) -> nn.Module:
    """The model of ``load_checkpoint``."""
    return load_checkpoint(section, config).model


def load_checkpoint(
    section: ModelSection,
    config: PreTrainedConfig | None = None,
    *,
    loader: Any = None,
    device: torch.device | None = None,
    in_few_bits: bool = True,
) -> Loaded:
    """The model with its weights, in ``section.dtype``, on the CPU and in evaluation mode.

    Weights in few bits are frozen, and of that dtype too to whatever reads them. They are read, and made of wider ones,
    a module at a time.

    Args:
        section: what is loaded.
        config: the checkpoint's.
        loader: the class, where it is another than the one the checkpoint was saved from.
        device: where weights in few bits are made; the CPU by default.
        in_few_bits: whether weights that the checkpoint holds in few bits stay so, or their values are taken.

    Raises:
        UserError: no checkpoint, unreadable weights, or weights that the checkpoint lacks.
    """
    config = load_config(section) if config is None else config
    if (base := quantized_base(section, config)) is None:
        return _loaded(section, config, loader, _from_pretrained)
    # which import every op
    from deltatune.training.quantized_weights import load_quantized

    load = partial(load_quantized, base=base, device=device or torch.device("cpu"), in_few_bits=in_few_bits)
    return _loaded(section, config, loader, load, base)


def _from_pretrained(loader: Any, **call: Any) -> tuple[Any, dict[str, Any]]:
    return cast("tuple[Any, dict[str, Any]]", loader.from_pretrained(output_loading_info=True, **call))


def describe_checkpoint(
    section: ModelSection, config: PreTrainedConfig | None = None, *, keep: Callable[[Any], set[str]] = _nothing
) -> tuple[Loaded, Pieces]:
    """``load_checkpoint`` with the weights still to be read, a module at a time, and stand-ins for them.

    Args:
        section, config: as for ``load_checkpoint``.
        keep: names of weights to read at once, given the model.

    Raises:
        UserError: as by ``load_checkpoint``.
        NotInPiecesError: a checkpoint that can be read whole alone.
    """
    from deltatune.hf.reading import NotInPiecesError, load_described

    config = load_config(section) if config is None else config
    if quantized_base(section, config) is not None:
        raise NotInPiecesError("it is quantised")
    pieces: list[Pieces] = []

    def described(loader: Any, **call: Any) -> tuple[Any, dict[str, Any]]:
        found = load_described(loader, keep, **call)
        pieces.append(found.pieces)
        return found.model, found.info

    return _loaded(section, config, None, described), pieces[0]


def _loaded(
    section: ModelSection,
    config: PreTrainedConfig,
    loader: Any,
    load: Callable[..., tuple[Any, dict[str, Any]]],
    base: QuantizedBase | None = None,
) -> Loaded:
    loader = model_class(config) if loader is None else loader
    dtype = "auto" if section.dtype == "auto" else getattr(torch, section.dtype)
    if base is not None:
        config = base.without_settings(config)
        dtype = dtype if base.method is None else _dtype(section, config)
    origin = origin_of(section, section.name_or_path)
    # a download has bars of its own
    loading = phase("loading the model") if _is_here(section, section.name_or_path, *_WEIGHTS) else nullcontext()
    try:
        with loading:
            model, info = load(loader, config=config, dtype=dtype, **origin)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = _why(error, section.name_or_path)
        raise UserError(f"cannot load model {section.name_or_path}: {why}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {section.name_or_path} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"such as {missing[0]}; they would start at random"
        )
    parts = sorted(filter(is_component, info["unexpected_keys"]))
    if parts and getattr(config, "quantization_config", None) is None and base is None:
        raise UserError(
            f"model {section.name_or_path} holds {parts[0]}, a part of a weight in few bits, and its config.json says "
            "nothing of it (quantization_config); take a checkpoint whose config.json does, or one in 16 bits"
        )
    assert isinstance(model, nn.Module)
    keep_settings(model)
    return Loaded(model, frozenset(info["unexpected_keys"]))


def empty_model(section: ModelSection, config: PreTrainedConfig | None = None, *, loader: Any = None) -> nn.Module:
    """The model on the meta device: every module and shape, no weights; what ``deltatune plan`` looks at.

    Which weights a checkpoint holds in few bits its files say; where they are not here, all of them are of 16.
    """
    with torch.device("meta"):
        return new_model(section, load_config(section) if config is None else config, loader=loader)


def new_model(section: ModelSection, config: PreTrainedConfig, *, loader: Any = None) -> nn.Module:
    """A model of this config in ``section.dtype``, its weights drawn at random on the current default device.

    Those in few bits are zero.
    """
    loader = model_class(config) if loader is None else loader
    dtype = (config.dtype or torch.float32) if section.dtype == "auto" else getattr(torch, section.dtype)
    make = loader._from_config if hasattr(loader, "_from_config") else loader.from_config
    base = quantized_base(section, config)
    model: nn.Module = make(config if base is None else base.without_settings(config), dtype=dtype)
    if base is not None:
        from deltatune.hf.quantizable import set_blank

        known = {name for name, _ in model.named_parameters()}  # of a config with fewer layers
        weights = _few_bits(section, base, model, loader)
        set_blank(model, {name: weight for name, weight in weights.items() if name in known})
    return model


def _few_bits(section: ModelSection, base: QuantizedBase, model: nn.Module, loader: Any) -> dict[str, QuantizedTensor]:
    """The weights of a model in few bits, on the meta device; none where only files say so that are not here."""
    from deltatune.training.quantized_weights import weights_in_few_bits

    if base.method is not None and not _is_here(section, section.name_or_path, *_WEIGHTS):
        return {}
    config = base.without_settings(load_config(section))
    try:
        with torch.device("cpu"):
            call = {"config": config, "dtype": _dtype(section, config), **origin_of(section, section.name_or_path)}
            return weights_in_few_bits(loader, base, model, **call)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = _why(error, section.name_or_path)
        raise UserError(f"cannot load model {section.name_or_path}: {why}") from error


def _dtype(section: ModelSection, config: PreTrainedConfig) -> torch.dtype:
    """Of values whose checkpoint is in few bits: the first of its weights may be of 8."""
    return (config.dtype or torch.bfloat16) if section.dtype == "auto" else getattr(torch, section.dtype)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with the recipe's tokens and chat template where they are given.

    Raises:
        UserError: no tokenizer there, a template that is unknown or cannot be read, or one for other control tokens;
            tokens that cannot be added, or take a role.
    """
    name = section.tokenizer or section.name_or_path
    check_tokenizer_path(section)
    loading = phase("loading the tokenizer") if _is_here(section, name, "tokenizer.json") else nullcontext()
    try:
        with loading:
            tokenizer = AutoTokenizer.from_pretrained(**origin_of(section, name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load a tokenizer from {name}: {_why(error, name)}; set model.tokenizer") from error
    if not tokenizer.get_vocab():
        raise UserError(f"{name} holds no tokenizer (no tokenizer.json); set model.tokenizer to one that does")
    add_tokens(tokenizer, section)
    if section.chat_template is not None:
        tokenizer.chat_template = read_template(section.chat_template, tokenizer)
    return tokenizer


def folder_of(section: ModelSection, name: str, patterns: tuple[str, ...]) -> Path:
    """The folder in which a checkpoint's files lie, those of the Hub that fit ``patterns`` downloaded.

    Raises:
        OSError: there is no such folder, or the Hub does not give them.
    """
    path = user_path(name)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {path}")
    revision = section.revision if name == section.name_or_path else None
    offline = _silence_about(name) is not None
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline))


def commit_of(section: ModelSection) -> str | None:
    """The commit that a model on the Hub is loaded from, since branches move; None for a folder."""
    if user_path(section.name_or_path).exists():
        return None
    try:
        folder = folder_of(section, section.name_or_path, ("config.json",))
    except OSError:
        return section.revision
    return folder.name if folder.parent.name == "snapshots" else section.revision


def origin_of(section: ModelSection, name: str) -> dict[str, Any]:
    """Where ``from_pretrained`` finds what goes by this name."""
    path = user_path(name)
    # absolute, because an adapter records where its base model is
    place = str(path.resolve()) if path.exists() else name
    origin: dict[str, Any] = {"pretrained_model_name_or_path": place, "trust_remote_code": section.trust_remote_code}
    if _silence_about(name) is not None:
        origin["local_files_only"] = True
    if section.revision is not None and name == section.name_or_path:
        origin["revision"] = section.revision
    return origin


def _is_here(section: ModelSection, name: str, *files: str) -> bool:
    """Whether a folder, or one of the files of a model on the Hub, is on this machine."""
    if user_path(name).exists():
        return True
    revision = section.revision if name == section.name_or_path else None
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)


def _silence_about(name: str) -> str | None:
    """Why nothing can be downloaded of what is not here; None for what is, and where something can."""
    return None if user_path(name).exists() else silence()


def _no_folder(path: Path) -> str:
    """That there is no folder of this name either, where its parent is one and it may have been meant."""
    meant = path.parent.is_dir() and not path.exists()
    return f"; there is no folder {path} either{near_files(path)}" if meant else ""


def _why(error: BaseException, name: str) -> str:
    """What went wrong with a model or tokenizer of this name."""
    silent = _silence_about(name)
    if silent is None or not isinstance(error, OSError):
        return first_line(error)
    absent = isinstance(error.__cause__, LocalEntryNotFoundError)
    what = f"it is not in {constants.HF_HUB_CACHE}" if absent else first_line(error).rstrip(".")
    return f"{what}, and {silent}; check the name and the connection, or give a checkpoint folder"
