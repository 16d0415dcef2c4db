"""What libraries raise where a disk is full or takes no files, as one line with the remedy."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from deltatune.errors import UserError, one_line

__all__ = ["has_filled", "writing"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
#: Less room than this is none.
_ROOM_BYTES: Final = 1 << 20


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


def has_filled(folder: Path, error: Exception) -> bool:
    """Whether writing into a folder failed for lack of room there, and not on another disk or in what was read."""
    if isinstance(error, SafetensorError):  # its files are written into the folder alone
        return "No space" in str(error) or "os error 28" in str(error)
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return False
    if error.filename is not None:
        return Path(str(error.filename)).is_relative_to(folder)
    return shutil.disk_usage(folder).free < _ROOM_BYTES


def _is_full(path: Path, error: Exception) -> bool:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    no_room = shutil.disk_usage(there).free < _ROOM_BYTES
    return no_room or "inline_container" in str(error) or "No space" in str(error)
