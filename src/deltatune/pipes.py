"""Output that nobody reads any more, such as that of ``deltatune train mine.yaml | head -1``."""

from __future__ import annotations

import os
import select
import signal
from typing import IO, Any, Final

__all__ = ["UNREAD", "discard", "is_unread"]

UNREAD: Final = 128 + signal.SIGPIPE
"""The exit status of a command whose output was not read to its end, as shells have it of other tools."""


def is_unread(stream: IO[Any] | None) -> bool:
    """Whether a stream leads into a pipe or socket whose reader is gone."""
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # it has none, or is closed
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def discard(stream: IO[Any]) -> None:
    """Leads a stream nowhere, with what its buffer holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
