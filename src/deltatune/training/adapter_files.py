"""What lies in an adapter's folder, read: or one line that says what is wrong with it."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import peft
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from deltatune.errors import UserError, one_line
from deltatune.training.sealed import damage_of, steps_of

__all__ = ["adapter_config", "adapter_digest", "adapter_settings", "adapter_weights"]

_CONFIG: Final = "adapter_config.json"


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` holds, of an adapter whose weights are there too.

    Raises:
        UserError: a folder that is no adapter, with the last whole checkpoint where a run left some in it; a file that
            is no JSON object, or has a value of another type than it should.
    """
    file = folder / _CONFIG
    if not file.is_file():
        raise UserError(f"{folder} is no adapter: it holds no {_CONFIG}{_last_whole(folder)}")
    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise UserError(f"{folder} is no adapter: it holds no adapter_model.safetensors")
    text = file.read_bytes()
    if text.startswith(codecs.BOM_UTF8):
        raise UserError(f"{file} begins with a byte order mark, which PEFT cannot read; save it as UTF-8 without one")
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON object: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no JSON object, but a JSON {type(found).__name__}")
    for name, (what, fits) in _VALUES.items():
        if found.get(name) is not None and not fits(found[name]):
            raise UserError(f"{file}: {name}: expected {what}, got {json.dumps(found[name])[:60]}")
    return found


def _is_rows(value: Any) -> bool:
    """Token numbers, or lists of them by layer."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(type(index) is int and index >= 0 for index in ids) for ids in lists)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


#: What is read here of an adapter's settings, beside PEFT.
_VALUES: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "auto_mapping": ("a mapping", lambda value: isinstance(value, dict)),
    "base_model_name_or_path": ("text", _is_text),
    "peft_type": ("text", _is_text),
    "revision": ("text", _is_text),
    "trainable_token_indices": ("token numbers, or lists of them by layer", _is_rows),
}


def _last_whole(folder: Path) -> str:
    """Where a run left the latest adapter that is not damaged, to follow the words that its folder holds none."""
    adapters = [path for path in steps_of(folder).values() if (path / _CONFIG).is_file()]
    whole = next((path for path in adapters if damage_of(path) is None), None)
    return "" if whole is None else f"; the run in it did not end, and its last whole checkpoint is {whole}"


def adapter_config(folder: Path) -> peft.PeftConfig:
    """The configuration, in PEFT's class for its type.

    Raises:
        UserError: a type that this PEFT does not know, or values that it does not take.
    """
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its adapter_config.json cannot be read by peft {peft.__version__}: {one_line(error)}"
        ) from error


def adapter_digest(folder: Path) -> str:
    """SHA-256 of the weights' files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_model.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The weights, by PEFT's names, on the CPU.

    Raises:
        UserError: a file that is cut off, or none of tensors.
    """
    try:
        found: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {one_line(error)}; copy them again") from error
    return found
