"""What a recipe needs of this machine, looked up before torch is imported: what is missing costs no seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from os import environ
from pathlib import Path
from typing import Final

import huggingface_hub

from deltatune.config.rules import quantization_errors, sharding_errors
from deltatune.config.schema import Fp8Quantization, LoraSection, ModelSection, Recipe
from deltatune.data.sources import check_source
from deltatune.data.well_known import find_template
from deltatune.errors import DataError, UserError, near_files, nearest, user_path
from deltatune.hf.source import model_types
from deltatune.quantization.released import disagreement, released, settings_of
from deltatune.training.adapter_settings import start_settings
from deltatune.training.beginning import Resume, begin
from deltatune.training.config_file import check_ranks
from deltatune.training.devices import check_precision, surely_on_cpu
from deltatune.training.first_rows import check_first_rows
from deltatune.training.hub import silence
from deltatune.training.layer_names import check_layer_names, json_of
from deltatune.training.names import check_names
from deltatune.training.sealed import steps_of
from deltatune.training.tokenizer_files import check_new_tokens, check_padding, rows_of_files, vocabulary_of_files

__all__ = [
    "check_model_path",
    "check_model_type",
    "check_tokenizer_path",
    "existing_parent",
    "missing_optimizer",
    "preflight",
]

# What optimizers need besides torch, by a part of their name; the first part that fits counts.
_OPTIMIZERS: Final[Mapping[str, str]] = {
    "torch_xla": "torch_xla",
    "torch_npu": "torch_npu",
    "torch_8bit": "torchao",
    "torch_4bit": "torchao",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
}
# the packages of the extra ``optimizers``
_EXTRA: Final = ("bitsandbytes", "torchao")
# distributions that go by another name than their package
_DISTRIBUTIONS: Final[Mapping[str, str]] = {"optimi": "torch-optimi"}

# files of tokenizers, by what their names hold
_OF_TOKENIZERS: Final = re.compile(r"tok|vocab|merges|spm|spiece|\.model$", re.IGNORECASE)

# what accelerate's launcher says to the processes that it starts
_LAUNCHED_WITH: Final = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")

# trackers -> packages, one of which is enough; of others transformers knows
_TRACKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "flyte": ("flytekit",),
    **{
        name: (name,)
        for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")
    },
}


def preflight(recipe: Recipe, resume: Resume = None) -> None:
    """What of a run can be found wrong without torch, by ``plan`` and ``train`` alike.

    Names and values in ``training``, packages of trackers and the optimizer, the device, paths (model, adapter, data,
    folders that are written to), what an earlier run left, the type of model, what its weights are in, names of
    layers, tokens, first rows.

    Raises:
        UserError: what is unknown, is not there, is not what it should be, or cannot be written to; or a launcher's
            sharding.
        DataError: a source that is not there, or the first of its rows that is broken.
    """
    training = recipe.training
    check_names(training)
    for missing in (missing_optimizer(training.optim), _missing_tracker(training.report_to)):
        if missing is not None:
            raise UserError(missing)
    if surely_on_cpu(training):
        check_precision(training)
    for name in _LAUNCHED_WITH:
        if environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"{name}={environ[name]} asks accelerate to divide the model; start the processes with torchrun, or "
                "accelerate launch --multi_gpu, and use parallel.shard"
            )
    _check_model(recipe)
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources):
            try:
                check_source(source.path, source.name)
            except DataError as error:
                raise DataError(f"data.{part}.{index}: {error}{_goes_on(recipe)}") from error
    _check_writable("training.output_dir", training.output_dir)
    if recipe.data.cache_dir is not None:
        _check_writable("data.cache_dir", recipe.data.cache_dir)
    if environ.get("RANK", "0") == "0":  # the others may not see its folder
        begin(recipe, resume, clears=False)
    check_first_rows(recipe)
    if (training.model_extra or {}).get("push_to_hub"):
        _check_push()  # asks the Hub, so it comes last


def _check_model(recipe: Recipe) -> None:
    """The model, its tokenizer, and what begins as an adapter."""
    section, lora = recipe.model, recipe.lora
    try:
        check_model_path(section)
        _check_adapter_path(lora)
    except UserError as error:
        raise UserError(f"{error}{_goes_on(recipe)}") from error
    check_model_type(section)
    _check_quantization(recipe)
    check_ranks(recipe)
    check_tokenizer_path(section)
    if section.chat_template is not None:
        find_template(section.chat_template)
    start = None if lora is None else lora.name_or_path
    if start is not None and (folder := user_path(start)).is_dir():
        start_settings(start, folder)
    check_layer_names(recipe)
    known, rows = vocabulary_of_files(section), rows_of_files(recipe)
    if known is not None:
        check_new_tokens(section, known)
        if rows is not None:
            check_padding(section, known, rows)


def _check_quantization(recipe: Recipe) -> None:
    """What a checkpoint folder is in, where it says so, against what the recipe makes of it."""
    section = recipe.model
    config = json_of(user_path(section.name_or_path) / "config.json")
    if not isinstance(config, dict):
        return
    try:
        found = released(settings_of(config))
    except ValueError as error:
        raise UserError(f"model {section.name_or_path}: {error}") from error
    given = section.quantization
    if given is not None:
        blocks = isinstance(given, Fp8Quantization) and given.blocks
        if why := disagreement(given.type, found, blocks=blocks, compute=given.compute):
            raise UserError(why)
    elif found is not None and found.is_read_here:
        errors = list(quantization_errors(recipe))
        sizes = {"shard": recipe.parallel.shard, "expert": recipe.parallel.expert}
        for name, size in sizes.items():
            if size not in (1, "auto"):
                errors += [f"parallel.{name}: {size}: {error}" for error in sharding_errors(recipe, few_bits=True)]
        if errors:
            raise UserError(f"model {section.name_or_path} is in {found.formats[0]}: {'; also: '.join(errors)}")


def _check_push() -> None:
    """What is pushed goes when checkpoints are saved, and the repository is made before."""
    if why := silence():
        raise UserError(f"training.push_to_hub: {why}; leave it out, or mend the connection")
    if huggingface_hub.get_token() is None:
        raise UserError("training.push_to_hub needs a token; run hf auth login, or set HF_TOKEN")


def check_model_path(section: ModelSection) -> None:
    """A checkpoint folder, or what may be a name on the Hub.

    Raises:
        UserError: neither.
    """
    path = user_path(section.name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        what = "is no checkpoint: it holds no config.json; expected config.json and weights"
        if (path / "adapter_config.json").is_file():
            merge = f"deltatune merge {path} --output OUTPUT"
            what = f"is an adapter, not a model; merge it first ({merge}) or name its base model"
        raise UserError(f"model {path} {what}")
    # no model that can be prepared goes by the short names of the Hub's first years
    local = section.name_or_path.startswith((".", "/", "~")) or section.name_or_path.count("/") != 1
    if path.is_file() or (not path.exists() and local):
        raise UserError(
            f"model {section.name_or_path} is no folder; expected a checkpoint folder (config.json and weights) or a "
            f"model name (owner/name) on the Hugging Face Hub{near_files(path)}"
        )


def check_model_type(section: ModelSection) -> None:
    """The type of model that a checkpoint folder names, where transformers has to know it.

    Raises:
        UserError: one that it does not know.
    """
    folder = user_path(section.name_or_path)
    config = json_of(folder / "config.json")
    if not isinstance(config, dict) or section.trust_remote_code or "auto_map" in config:
        return  # what cannot be read, transformers says
    kind, known = config.get("model_type"), model_types()
    # what a program has registered is in no source
    loaded = sys.modules.get("transformers.models.auto.configuration_auto")
    if not isinstance(kind, str) or known is None or kind in known or (loaded and kind in loaded.CONFIG_MAPPING):
        return
    raise UserError(
        f"cannot read model {section.name_or_path}: its config.json has model_type {kind}, which transformers "
        f"{version('transformers')} does not know{nearest(kind, known)}; install one that does, or take another model"
    )


def check_tokenizer_path(section: ModelSection) -> None:
    """A folder that may hold a tokenizer, or what may be a name on the Hub.

    Raises:
        UserError: neither.
    """
    name = section.tokenizer or section.name_or_path
    key = "name_or_path" if section.tokenizer is None else "tokenizer"
    path = user_path(name)
    if name.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"model.{key}: {name} is no folder; expected a checkpoint folder{near_files(path)}")
    if path.is_dir() and not any(_OF_TOKENIZERS.search(file.name) for file in path.iterdir()):
        raise UserError(f"cannot load a tokenizer from {name}: it holds no tokenizer.json; set model.tokenizer")


def _check_adapter_path(section: LoraSection | None) -> None:
    """The folder of an adapter that a run begins with, where its name can be nothing else."""
    name = None if section is None else section.name_or_path
    if name is None or user_path(name).is_dir() or not name.startswith((".", "/", "~")):
        return
    raise UserError(f"lora.name_or_path: {name} is no folder; expected an adapter's{near_files(user_path(name))}")


def _goes_on(recipe: Recipe) -> str:
    """How a run goes on whose start or data is no longer where it was, to follow the words that it is missing."""
    if not steps_of(user_path(recipe.training.output_dir)):
        return ""
    return (
        f"; the run in {recipe.training.output_dir} goes on with --resume where the key names the new place of what "
        "has moved"
    )


def missing_optimizer(optimizer: str) -> str | None:
    """Which package an optimizer lacks here, with the remedy; None where it lacks none."""
    package = next((package for part, package in _OPTIMIZERS.items() if part in optimizer), None)
    if package is None or find_spec(package) is not None:
        return None
    distribution = _DISTRIBUTIONS.get(package, package.replace("_", "-"))
    wanted = "'deltatune[optimizers]'" if package in _EXTRA else distribution
    return f"training.optim: {optimizer} needs the package {distribution}; pip install {wanted}"


def _missing_tracker(report_to: str | tuple[str, ...]) -> str | None:
    """Which package a tracker lacks here, with the remedy; None where they lack none, or are unknown."""
    for name in (report_to,) if isinstance(report_to, str) else report_to:
        packages = _TRACKERS.get(name, ())
        if packages and not any(find_spec(package) is not None for package in packages):
            return (
                f"training.report_to: the package of {name} is not installed; pip install "
                f"{packages[0].replace('_', '-')}, or set report_to: none"
            )
    return None


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way to a path that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _check_writable(key: str, name: str) -> None:
    path = user_path(name)
    if "\0" in name:
        raise UserError(f"{key}: {name!r} names no folder: no name holds a null character")
    parent = existing_parent(path)
    for folder in (path, *path.absolute().parents):
        if folder.is_symlink() and not folder.exists():
            raise UserError(
                f"{key}: {folder} is a link to {folder.readlink()}, which is not there; make that folder, or choose "
                "another one"
            )
    if not parent.is_dir():
        what = "choose a folder" if parent == path else f"it cannot hold the folder {path}"
        raise UserError(f"{key}: {parent} is a file; {what}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {parent} cannot be written to; choose another folder, or change its permissions")
