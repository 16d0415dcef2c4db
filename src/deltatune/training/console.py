"""Where a run speaks: lines on a console and in the train.log of its folder, and phases that are under way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path

from rich.console import Console

from deltatune.phases import Advance
from deltatune.pipes import discard, is_unread
from deltatune.runs.command import command_line
from deltatune.training.phase_lines import MovingLines, plain_lines

__all__ = ["LOG_FILE", "RunConsole", "Screen"]

LOG_FILE = "train.log"

_GONE = (
    f"nobody reads the standard output any more; the run goes on, and what it says is in {LOG_FILE} of its folder "
    "(Ctrl-C or SIGTERM ends it)"
)


class Screen(Console):
    """A console that a run outlives: what is written to a pipe whose reader is gone goes nowhere from then on.

    Attributes:
        tell: what hears of it, once.
    """

    tell: Callable[[str], None] = staticmethod(lambda _: None)

    def on_broken_pipe(self) -> None:
        """Says so on the standard error; rich would end the process in silence."""
        self.quiet = True
        discard(self.file)
        if is_unread(sys.stderr):
            discard(sys.stderr)
        else:
            sys.stderr.write(f"{_GONE}\n")
        self.tell(_GONE)


class RunConsole:
    """A console whose lines are kept as well, in ``train.log`` once the run's folder is its own.

    Args:
        screen: where lines are shown. What is drawn on it past this class is not kept.
        moving: whether phases are shown.
    """

    def __init__(self, screen: Console, *, moving: bool = True) -> None:
        self.screen = screen
        self._moving, self._lines = moving, MovingLines(screen)
        self._file: Path | None = None
        self._early: list[str] = []  # said before there was a file
        if isinstance(screen, Screen):
            screen.tell = self.keep

    @property
    def table_width(self) -> int | None:
        """Columns that a table may take; None where nobody looks at it in a window."""
        return self.screen.width if self.screen.is_terminal else None

    def out(self, text: str, *, highlight: bool = False) -> None:
        """Shows a line, or several, as they are, and keeps them."""
        self.screen.out(text, highlight=highlight)
        self.keep(text)

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Shows a phase while it lasts: a moving line on a terminal, elsewhere a plain one now and then."""
        if self._moving and not self.screen.is_interactive and not self.screen.quiet:
            return plain_lines(self.out, name, total)
        return self.moving_phase(name, total)

    def moving_phase(self, name: str, total: int | None = None, done: int = 0) -> AbstractContextManager[Advance]:
        """Shows a phase on a terminal alone: elsewhere it has lines of its own."""
        if self._moving and self.screen.is_interactive and not self.screen.quiet:
            return self._lines.line(name, total, done)
        return nullcontext(lambda _done: None)

    def keep(self, text: str) -> None:
        """A line, or several, for the file alone."""
        if self._file is None:
            self._early.append(text)
            return
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{text}\n")

    def keep_in(self, folder: Path) -> None:
        """From here on lines are appended to the folder's ``train.log``, after the command and what was said before."""
        early, self._early = self._early, []
        self._file = folder / LOG_FILE
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        for text in [f"=== {now} {command_line()}", *early]:
            self.keep(text)
