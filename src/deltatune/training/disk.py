"""What libraries raise where a disk is full or takes no files, as one line with the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltatune.errors import UserError, one_line

__all__ = ["writing"]


@contextmanager
def writing(path: Path, failed: str, remedy: str) -> Iterator[None]:
    """Within it files are written below the folder of ``path``.

    torch, safetensors and tokenizers raise errors of their own, some of them a bare ``Exception``, for what the
    operating system said.

    Raises:
        UserError: ``<path> cannot be <failed>: <what was said>; <remedy>``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or _is_full(path, error):
            raise UserError(f"{path} cannot be {failed}: {one_line(error)}; {remedy}") from error
        raise


def _is_full(path: Path, error: Exception) -> bool:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free < 1 << 20 or "inline_container" in str(error) or "No space" in str(error)
