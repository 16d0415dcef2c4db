"""Files and folders that appear whole or not at all, also where the power fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["sync", "sync_tree", "whole"]


@contextmanager
def whole(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """The name of a file beside ``path``, which takes its place when the block succeeds and goes when it does not.

    ``synced``: it is on the disk before it takes its place, and its new name when the block has ended.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        if synced:
            sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if synced:
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """The same of a folder and of every file and folder below it; what links point to is left out."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync(path)
    sync(folder)
