"""What an adapter's ``adapter_config.json`` says, read without PEFT: or one line that says what is wrong with it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from deltatune.errors import UserError, one_line
from deltatune.training.sealed import damage_of, steps_of

__all__ = ["adapter_settings", "start_settings"]

_CONFIG: Final = "adapter_config.json"
_KEY: Final = "lora.name_or_path"
_CHANGE_BASE: Final = re.compile(r"(?i)pissa|olora|corda|loftq|lora_ga")


def start_settings(name: str, folder: Path) -> dict[str, Any]:
    """``adapter_settings`` of an adapter that a run may begin with; ``name`` is the recipe's for it.

    Raises:
        UserError: as ``adapter_settings``; an adapter of other base weights, or one that is no LoRA.
    """
    try:
        saved = adapter_settings(folder)
    except UserError as error:
        raise UserError(f"{_KEY}: {error}") from error
    kind, init = saved.get("peft_type"), str(saved.get("init_lora_weights"))
    if _CHANGE_BASE.match(init):
        raise UserError(
            f"{_KEY}: {name} is an adapter of other base weights than those on disk ({init}); merge it (deltatune "
            "merge) and begin with the result, or save it again by PEFT's path_initial_model_for_weight_conversion"
        )
    if kind != "LORA":
        raise UserError(f"{_KEY}: {name} is an adapter of type {kind}; LoRA is the one that a recipe trains")
    return saved


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
