"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from deltatune.errors import UserError
from deltatune.training.processes import started

__all__ = ["check_free", "clear_stale", "locked"]

LOCK = ".lock"
_WRITING = 10.0  # seconds in which a lock that holds nothing may be one that is being written
_PAUSE = 0.05
_LAST_PID = 2**31 - 1  # larger numbers are no process's, and the system does not take them


@contextmanager
def locked(output_dir: Path, remedy: str = "choose another training.output_dir") -> Iterator[None]:
    """Holds a folder for this process; the lock of one that is gone is taken over, by one process.

    Raises:
        UserError: a process that goes on holds the folder, or no file can be written there; ``remedy`` is what else the
            user may do.
    """
    file = output_dir / LOCK
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": started(os.getpid())}
    try:
        while not (_create(file, mine) or _take_over(file, mine, remedy)):
            pass
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; make room, or {remedy}") from error
    try:
        yield
    finally:
        if _read(file) == mine:
            file.unlink(missing_ok=True)


def check_free(output_dir: Path, remedy: str = "choose another training.output_dir") -> None:
    """Refuses a folder that a run holds, before anything in it is touched.

    A lock that holds nothing yet is waited for; one that a run left so when it was killed holds nothing later either.

    Raises:
        UserError: a run that goes on holds the folder, or something else has the name of the lock.
    """
    file = output_dir / LOCK
    if file.is_dir() or (file.is_symlink() and not file.exists()):
        what = "a folder" if file.is_dir() else "a link to nothing"
        raise UserError(f"{file} is {what}, and a run's lock is a file; remove it, or {remedy}")
    holder, until = _read(file), time.monotonic() + _WRITING
    # the clock of the machine that wrote it may be ahead by days
    while holder is None and file.exists() and _age(file) < _WRITING and time.monotonic() < until:
        time.sleep(_PAUSE)
        holder = _read(file)
    if holder is not None and _runs(holder):
        raise UserError(
            f"{output_dir} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for it, "
            f"{remedy}, or remove {file} if that run is gone"
        )


def clear_stale(output_dir: Path) -> None:
    """Removes the lock of a run that is gone, which a finished run would keep: nothing takes it over.

    Raises:
        UserError: another run has taken the folder.
    """
    if (output_dir / LOCK).exists():
        with locked(output_dir):
            pass


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _create(file: Path, content: dict[str, Any]) -> bool:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        stream = file.open("x", encoding="utf-8")
    except (FileExistsError, FileNotFoundError):  # the folder may go as its holder does
        return False
    with stream:
        _wait_for(stream)
        # another may have taken it for one that nobody goes on writing
        free = _is_at(file, stream.fileno()) and os.fstat(stream.fileno()).st_size == 0
        if free:
            json.dump(content, stream)
        return free


def _take_over(file: Path, content: dict[str, Any], remedy: str) -> bool:
    """Writes over the lock of a process that is gone; of several that would, the first.

    The file stays, held by the system's own lock while it is looked at and written: removed, it might be one that
    another process has made since.
    """
    try:
        stream = file.open("r+", encoding="utf-8")
    except FileNotFoundError:
        check_free(file.parent, remedy)
        return False
    with stream:
        _wait_for(stream)
        check_free(file.parent, remedy)
        if not _is_at(file, stream.fileno()):
            return False
        stream.truncate()
        json.dump(content, stream)
        return True


def _wait_for(stream: TextIO) -> None:
    """Holds a file until it is closed; where a file system has no such locks, looking has to be enough."""
    with suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_EX)


def _is_at(file: Path, handle: int) -> bool:
    """Whether an open file is the one of this name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _runs(holder: dict[str, Any]) -> bool:
    """Whether a holder may still be there: of another host nothing is known."""
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or not 0 < pid <= _LAST_PID or pid == os.getpid():
        return pid == os.getpid() and holder.get("started") == started(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # the number may be another process's by now
    return holder.get("started") == started(pid)
