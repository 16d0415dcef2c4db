"""Where a run speaks: on a console, and in the train.log of its folder."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console

__all__ = ["LOG_FILE", "RunConsole"]

LOG_FILE = "train.log"


class RunConsole:
    """A console whose lines are kept as well, in ``train.log`` once the run's folder is its own.

    Args:
        screen: where lines are shown. What is drawn on it past this class, such as a progress bar, is not kept.
    """

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self._file: Path | None = None
        self._early: list[str] = []  # said before there was a file

    def out(self, text: str, *, highlight: bool = False) -> None:
        """Shows a line, or several, as they are, and keeps them."""
        self.screen.out(text, highlight=highlight)
        self.keep(text)

    def keep(self, text: str) -> None:
        """A line, or several, for the file alone."""
        if self._file is None:
            self._early.append(text)
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")

    def keep_in(self, folder: Path) -> None:
        """From here on lines are appended to the folder's ``train.log``, after the command and what was said before."""
        early, self._early = self._early, []
        self._file = folder / LOG_FILE
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        for text in [f"=== {now} {shlex.join(sys.argv)}", *early]:
            self.keep(text)
