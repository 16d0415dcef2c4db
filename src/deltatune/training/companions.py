"""Files beside a model's weights that travel with what is made of it: byte for byte where nothing changed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltatune.hf.generation import PublishedSettings

__all__ = ["BESIDE_WEIGHTS", "copy_generation_config", "copy_processors", "write_tokenizer"]

_TOKENIZER: Final = (
    "tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*",
)  # fmt: skip
_TEMPLATES: Final = ("chat_template*", "additional_chat_templates/*")
_PROCESSORS: Final = (
    "*preprocessor_config.json", "processor_config.json", "processing_*.py", "*image_processing*.py",
    "*video_processing*.py", "feature_extraction*.py", "audio_tokenizer_config.json",
)  # fmt: skip
_GENERATION: Final = "generation_config.json"

#: Names of all of them, to download.
BESIDE_WEIGHTS: Final = (*_TOKENIZER, *_TEMPLATES, *_PROCESSORS, _GENERATION)

# where a tokenizer was loaded from, and what its last call left in it
_PASSING: Final = ("name_or_path", "is_local", "local_files_only", "truncation", "padding", "transformers_version")


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, sources: Iterable[Path], folder: Path, *, trust_remote_code: bool = False
) -> None:
    """Saves a tokenizer: as copies of the files of the first source that it equals.

    Where it equals none, as after its chat template was replaced, those files of the first source that would be saved
    alike are copied.
    """
    tokenizer.save_pretrained(str(folder))
    written = _names(folder)
    first: tuple[Path, set[str]] | None = None
    for source in sources:
        changed = _changed(folder, written, source, trust_remote_code=trust_remote_code)
        if changed is None:
            continue
        if not changed:
            for name in written:
                (folder / name).unlink()
            _copy(source, _matching(source, (*_TOKENIZER, *_TEMPLATES)), folder)
            return
        first = first or (source, changed)
    if first is not None:
        source, changed = first
        _copy(source, _unchanged(source, written, changed), folder)


def copy_processors(source: Path, folder: Path) -> None:
    """The configurations (and code) of processors for images, video and sound."""
    _copy(source, _matching(source, _PROCESSORS), folder)


def copy_generation_config(source: Path, folder: Path) -> None:
    """The source's ``generation_config.json`` in place of the one in ``folder`` that says the same, or of none."""
    if not (source / _GENERATION).is_file():
        return
    target = folder / _GENERATION
    if target.is_file():
        with tempfile.TemporaryDirectory() as again:
            PublishedSettings.from_pretrained(str(source)).save_pretrained(again)
            if _settings(Path(again) / _GENERATION) != _settings(target):
                return
    shutil.copyfile(source / _GENERATION, target)


def _settings(file: Path) -> dict[str, Any]:
    """Of generation, with the tokens that end a text as a set: transformers 5.17 puts the tokenizer's in once more."""
    content = _content(file) or {}
    ends = content.get("eos_token_id")
    return {**content, "eos_token_id": set(ends) if isinstance(ends, list) else {ends}}


def _changed(folder: Path, written: set[str], source: Path, *, trust_remote_code: bool) -> set[str] | None:
    """Names of files that the source's own tokenizer is saved with otherwise; None where it has no tokenizer."""
    try:
        own = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None
    with tempfile.TemporaryDirectory() as again:
        own.save_pretrained(again)
        names = written | _names(Path(again))
        return {name for name in names if _content(folder / name) != _content(Path(again) / name)}


def _unchanged(source: Path, written: set[str], changed: set[str]) -> Iterator[str]:
    for name in _matching(source, _TOKENIZER):
        # beside a changed tokenizer.json, a vocabulary in another file would be another one
        same = name not in changed if name in written else "tokenizer.json" not in changed
        # an older file may hold the template too
        if same and not (name == "tokenizer_config.json" and "chat_template" in (_content(source / name) or {})):
            yield name


def _matching(source: Path, patterns: tuple[str, ...]) -> list[str]:
    found = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(source)) for path in found)


def _names(folder: Path) -> set[str]:
    return set(_matching(folder, (*_TOKENIZER, *_TEMPLATES)))


def _content(path: Path) -> Any:
    """What a file says; None where there is none."""
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    value = json.loads(path.read_text(encoding="utf-8"))
    return {key: each for key, each in value.items() if key not in _PASSING} if isinstance(value, dict) else value


def _copy(source: Path, names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
