"""One run in a folder at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltatune.errors import UserError
from deltatune.training.processes import started

__all__ = ["check_free", "locked"]

LOCK = ".lock"
_WRITING = 10.0  # seconds in which a lock that holds nothing may be one that is being written
_PAUSE = 0.05


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Holds a folder for this process; the lock of one that is gone is taken over.

    Raises:
        UserError: a run that goes on holds the folder.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / LOCK
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid())}
    while not _create(file, mine):
        check_free(output_dir)
        file.unlink(missing_ok=True)
    try:
        yield
    finally:
        if _read(file) == mine:
            file.unlink(missing_ok=True)


def check_free(output_dir: Path) -> None:
    """Refuses a folder that a run holds, before anything in it is touched.

    A lock that holds nothing yet is waited for; one that a run left so when it was killed holds nothing later either.

    Raises:
        UserError: a run that goes on holds the folder.
    """
    file = output_dir / LOCK
    holder = _read(file)
    while holder is None and file.exists() and _age(file) < _WRITING:
        time.sleep(_PAUSE)
        holder = _read(file)
    if holder is not None and _runs(holder):
        raise UserError(
            f"{output_dir} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for it, choose "
            f"another training.output_dir, or remove {file} if that run is gone"
        )


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _create(file: Path, content: dict[str, Any]) -> bool:
    try:
        with file.open("x", encoding="utf-8") as stream:
            json.dump(content, stream)
    except FileExistsError:
        return False
    return True


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _runs(holder: dict[str, Any]) -> bool:
    """Whether a holder may still be there: of another host nothing is known."""
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return pid == os.getpid() and holder.get("started") == started(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # the number may be another process's by now
    return holder.get("started") == started(pid)
