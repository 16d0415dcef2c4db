"""Phases on a terminal, a moving line each, and elsewhere as a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from deltatune.phases import Advance

__all__ = ["MovingLines", "plain_lines"]

_FIRST, _EVERY = 2.0, 60.0  # seconds until a phase is worth a plain line, and another
_REDRAW = 0.25  # seconds
_BAR = 16  # characters
_TURNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class MovingLines:
    """The phases that are under way, one below the other; they leave nothing on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def line(self, name: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """One more line while the block lasts, however it ends."""
        if self._progress is not None:
            with _task(self._progress, name, total, done) as advance:
                yield advance
            return
        # a new one each time: one that has stopped would draw over what was written since
        column = _Line(lambda: self._console.width)
        self._progress = Progress(column, console=self._console, transient=True, auto_refresh=False)
        try:
            redrawing = _repeated(self._progress.refresh, _REDRAW, _REDRAW)
            with self._progress as progress, redrawing, _task(progress, name, total, done) as advance:
                yield advance
        finally:
            self._progress = None


@contextmanager
def plain_lines(say: Callable[[str], None], name: str, total: int | None) -> Iterator[Advance]:
    """A line when a phase has taken two seconds, and one a minute then."""
    began, reached = time.monotonic(), [0]

    def speak() -> None:
        parts = "" if total is None else f" {reached[0]}/{total}"
        say(f"{name}{parts}, for {time.monotonic() - began:.0f} s")

    with _repeated(speak, _FIRST, _EVERY):
        yield partial(reached.__setitem__, 0)


@contextmanager
def _task(progress: Progress, name: str, total: int | None, done: int) -> Iterator[Advance]:
    task = progress.add_task(name, total=total, completed=done)
    try:
        yield lambda count: progress.update(task, completed=count)
    finally:
        progress.remove_task(task)


@contextmanager
def _repeated(act: Callable[[], None], first: float, every: float) -> Iterator[None]:
    """Acts after some seconds and then every so many, in a thread that ends with the block: the work may not return."""
    ended = threading.Event()

    def run() -> None:
        wait = first
        while not ended.wait(wait):
            act()
            wait = every

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Line(ProgressColumn):
    """Name, bar, parts, time, and time left in one cell, so that a narrow terminal cuts the name and nothing else."""

    def __init__(self, width: Callable[[], int]) -> None:
        super().__init__(Column(no_wrap=True))
        self._width = width

    def render(self, task: Task) -> Text:
        """No wider than the terminal."""
        turn = _TURNS[int(4 * task.get_time()) % len(_TURNS)]
        rest = f" {_clock(task.elapsed)}"
        if task.total is not None:
            done = min(round(_BAR * task.completed / max(task.total, 1)), _BAR)
            bar = "━" * done + "─" * (_BAR - done)
            rest = f" {bar} {task.completed:.0f}/{task.total:.0f}{rest} left {_clock(task.time_remaining)}"
        room = self._width() - len(turn) - 1 - len(rest)
        name = task.description if len(task.description) <= room else f"{task.description[: max(room - 1, 0)]}…"
        return Text(f"{turn} {name}{rest}")


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))
