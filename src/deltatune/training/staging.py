"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltatune.phases import phase
from deltatune.training.disk import writing
from deltatune.training.lock import locked
from deltatune.whole import sync, sync_tree

__all__ = ["staged"]


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder next to ``path`` that becomes ``path`` when the block succeeds, and disappears when it does not.

    All of it is on the disk before it has its name. What a process that was killed left of it is cleared by the next
    that writes the same path.

    Raises:
        UserError: another process is writing that path, or the disk does not take the files.
    """
    around = path.parent / f".{path.name}-staging"
    try:
        with locked(around, "choose another output folder"):
            folder = around / "whole"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                with writing(path, "written", "nothing is left of it"):
                    yield folder
                with phase(f"writing {path.name} to the disk"):
                    sync_tree(folder)
                if path.is_dir():
                    path.rmdir()
                folder.replace(path)
                sync(path.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # another process may hold it
            around.rmdir()
