"""What comes out of a run: an adapter or a model that stock transformers and PEFT load, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, one_line
from deltatune.training.checkpoint import empty_model, load_config, load_model, load_tokenizer
from deltatune.training.servers import per_expert

__all__ = [
    "CARD_FILE",
    "check_kind",
    "export_adapter",
    "finite",
    "holds_model",
    "merge_adapter",
    "readable",
    "save_trained",
    "staged",
    "write_json",
]

CARD_FILE = "README.md"

# Readers tell an adapter or a model by these files, so they are moved into place last.
_MARKERS = ("adapter_config.json", "config.json")


def save_trained(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, output_dir: Path, card: str | None = None
) -> None:
    """Saves the adapter of a PEFT model, or the whole model, with its tokenizer and its card, into ``output_dir``.

    Files are written to a folder next to them and moved in when all are there; an older model in the folder is
    replaced, checkpoints and records stay.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as folder:
        _save(model, tokenizer, Path(folder))
        if card is not None:
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name in _MARKERS):
            path.replace(output_dir / path.name)


def check_kind(output_dir: Path, *, adapter: bool) -> None:
    """Refuses a folder that holds what a run of the other kind left: loaders would read a mixture of both.

    Raises:
        UserError: an adapter where a model will be saved, or a model where an adapter will.
    """
    other = _MARKERS[1] if adapter else _MARKERS[0]
    if (output_dir / other).is_file():
        kinds = ("a model", "an adapter") if adapter else ("an adapter", "a model")
        raise UserError(
            f"training.output_dir: {output_dir} holds {kinds[0]} ({other}), and this run saves {kinds[1]}; choose "
            "another folder"
        )


def holds_model(output_dir: Path) -> bool:
    """Whether a folder holds an adapter or a model."""
    return any((output_dir / name).is_file() for name in _MARKERS)


def readable(folder: Path) -> None:
    """Gives files the mode that new files have: safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Adds an adapter to its base model's weights and saves a model that needs no PEFT.

    Args:
        adapter_dir: a folder that PEFT's ``save_pretrained`` wrote.
        output_dir: the model's folder, which is returned; it must not exist, or be empty.
        base: the base model, where it is no longer where the adapter says.
        dtype: of the merged weights: ``auto`` (the base model's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with the base model.

    Raises:
        UserError: a folder that holds no adapter, a base model that cannot be found, or an output folder in use.
    """
    adapter, output = _adapter_and_output(adapter_dir, output_dir)
    section, config = _base_of(adapter, base, dtype=dtype, trust_remote_code=trust_remote_code)
    merged = _merged(load_model(section, config), adapter)
    if (adapter / "tokenizer_config.json").is_file():
        # the adapter's own has its chat template
        section = section.model_copy(update={"tokenizer": str(adapter)})
    tokenizer = load_tokenizer(section)
    with staged(output) as folder:
        _save(merged, tokenizer, folder)
    return output


def export_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    layout: str,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Writes an adapter in a form that an inference server reads; see ``servers``.

    Args:
        adapter_dir: a folder that PEFT's ``save_pretrained`` wrote.
        output_dir: the new adapter's folder, which is returned; it must not exist, or be empty.
        layout: ``"peft"``, or ``"per-expert"`` for one pair of matrices for each projection of each routed expert.
        base: the base model, where it is no longer where the adapter says; its config alone is read.
        trust_remote_code: run model code that comes with the base model.

    Raises:
        UserError: a folder that holds no adapter, a base model that cannot be found, adapters that cannot be split, or
            an output folder in use.
    """
    adapter, output = _adapter_and_output(adapter_dir, output_dir)
    state, config = (
        load_peft_weights(str(adapter), device="cpu"),
        json.loads((adapter / _MARKERS[0]).read_text("utf-8")),
    )
    if layout == "per-expert":
        section, _ = _base_of(adapter, base, trust_remote_code=trust_remote_code)
        state, config = per_expert(state, config, empty_model(section))
    with staged(output) as folder:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
        write_json(folder / _MARKERS[0], config)
        for path in adapter.iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                shutil.copy2(path, folder / path.name)
    return output


def _adapter_and_output(adapter_dir: str | Path, output_dir: str | Path) -> tuple[Path, Path]:
    adapter, output = Path(adapter_dir).expanduser(), Path(output_dir).expanduser()
    _adapter_base(adapter)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another output folder")
    return adapter, output


def _base_of(
    adapter: Path, base: str | None, *, dtype: str = "auto", trust_remote_code: bool
) -> tuple[ModelSection, PreTrainedConfig]:
    """The base model of an adapter as a section of a recipe, and its config."""
    name = base or _adapter_base(adapter)
    if not name:
        raise UserError(f"{adapter} names no base model; pass it with --base")
    section = ModelSection.model_validate(
        {"name_or_path": name, "dtype": dtype, "trust_remote_code": trust_remote_code}
    )
    try:
        return section, load_config(section)
    except UserError as error:
        raise UserError(f"the adapter's base model: {error}; pass another with --base") from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder next to ``path`` that becomes ``path`` when the block succeeds, and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        yield Path(folder)
        # temporary folders are private; a model is not
        Path(folder).chmod(0o755)
        if path.is_dir():
            path.rmdir()
        Path(folder).replace(path)


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all, with numbers that it does not know (NaN, infinities) as text."""
    write_text(path, json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with numbers that JSON does not know (NaN, infinities) as text."""
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Text, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _save(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    save: Any = model.save_pretrained
    save(str(folder))
    # PEFT's card asks 39 questions and answers none
    (folder / CARD_FILE).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    readable(folder)


def _adapter_base(adapter: Path) -> str | None:
    """The base model an adapter names."""
    marker = adapter / "adapter_config.json"
    if not marker.is_file():
        raise UserError(f"{adapter} is no adapter: it holds no adapter_config.json")
    if not any((adapter / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise UserError(f"{adapter} is no adapter: it holds no adapter_model.safetensors")
    try:
        recorded = json.loads(marker.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{marker} is no JSON object: {error}") from error
    return None if recorded is None else str(recorded)


def _merged(model: nn.Module, adapter: Path) -> nn.Module:
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{adapter} does not fit its base model: {one_line(error)[:300]}") from error
    with torch.no_grad():
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged
