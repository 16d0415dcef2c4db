"""Whether two folders hold the same weights, told without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from deltatune.config.schema import Recipe
from deltatune.errors import user_path
from deltatune.phases import phase

__all__ = ["STARTS", "digest_of", "digests_of"]

STARTS: Final = ("model.name_or_path", "lora.name_or_path")
"""The keys that name what a run begins with."""

_FILES: Final = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")
_WHOLE: Final = 16 * 2**20  # a smaller file is read whole
_BLOCK: Final = 2**18
_BLOCKS: Final = 32


def digests_of(recipe: Recipe) -> Mapping[str, str | None]:
    """The digest of what a run begins with, by key; None for what is no folder here."""
    adapter = None if recipe.lora is None else recipe.lora.name_or_path
    return {key: digest_of(name) for key, name in zip(STARTS, (recipe.model.name_or_path, adapter), strict=True)}


def digest_of(name: str | None) -> str | None:
    """SHA-256 of a folder's weights and configurations: names, sizes, and 32 blocks of 256 KiB spread over each file.

    Files up to 16 MiB count whole. Other weights differ in every block; a change of a few bytes of a large file may go
    unseen. None for a name that is no folder.
    """
    folder = None if name is None else user_path(name)
    if folder is None or not folder.is_dir():
        return None
    found = hashlib.sha256()
    with phase("computing the digest of the weights"):
        for path in sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}):
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as stream:
                if size <= _WHOLE:
                    found.update(stream.read())
                    continue
                for block in range(_BLOCKS):
                    stream.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                    found.update(stream.read(_BLOCK))
    return found.hexdigest()
