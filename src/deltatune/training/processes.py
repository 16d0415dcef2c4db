"""A process as others know it: on which machine, by which number, and whether it is still there."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "started"]


@dataclass(frozen=True)
class Process:
    """Where and what a process is; ``place``, if known: the boot and namespace that ``pid`` counts in."""

    host: str
    pid: int
    started: str | None
    place: str | None

    @classmethod
    def this(cls) -> Process:
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), started(os.getpid()), _place())

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"

    @property
    def is_here(self) -> bool:
        """Whether its number means the same process to this one."""
        return self.place is not None and self.place == _place()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; of another machine nothing is known."""
        return self.is_here and (started(self.pid) != self.started or _state(self.pid) in "ZX")

    def kill(self) -> None:
        """Ends it at once, where it is of this machine: a stopped process takes no other signal."""
        if self.is_here and not self.is_gone:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None where it is not there, or the system does not say."""
    fields = _fields(pid)
    return fields[19] if len(fields) > 19 else None


def _state(pid: int) -> str:
    return next(iter(_fields(pid)), "X")


def _fields(pid: int) -> list[str]:
    """What the system says of a process after its name, which may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
