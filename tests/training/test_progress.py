"""The bar keeps step, total and time left at any width; log entries are lines."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deltatune.training.console import RunConsole
from deltatune.training.progress import ProgressBar

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LOGS = {"loss": 11.2426, "learning_rate": 1e-3, "tokens_per_second": 1689.0, "fill": 0.955, "peak_memory_gib": 12.5}


def screen(width: int, *, terminal: bool, moving: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    shown = ProgressBar(RunConsole(console, moving=moving))
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=2000, global_step=0)
    shown.on_train_begin(None, state, None)
    for step in (1200, 1217, 1234):
        state.global_step = step
        shown.on_step_end(None, state, None)
        time.sleep(0.2 if terminal and moving else 0)
    shown.on_log(None, state, None, LOGS)
    time.sleep(0.4 if terminal and moving else 0)  # it is drawn four times a second
    shown.close()
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_step_total_and_time_left_stand_at_any_width(width: int) -> None:
    lines = [ESCAPE.sub("", line) for line in screen(width, terminal=True).splitlines()]
    last = [line for line in lines if "training" in line][-1]
    assert "1234/2000" in last
    # 766 steps, of which 17 take at least 0.2 s
    found = re.search(r"left (\d):(\d\d):(\d\d)", last)
    assert found is not None
    hours, minutes, seconds = map(int, found.groups())
    assert 3600 * hours + 60 * minutes + seconds >= 9
    assert len(last.rstrip()) <= width


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_log_entries_are_lines_that_fit(width: int) -> None:
    (line,) = [ESCAPE.sub("", line) for line in screen(width, terminal=True).splitlines() if "loss" in line]
    entry = line[line.index("step") :].rstrip()
    assert entry.startswith("step 1234/2000 · loss 11.2426")
    assert len(entry) <= width
    assert entry.endswith("peak GiB 12.50") == (width >= 120)


@pytest.mark.parametrize(("terminal", "moving"), [(False, True), (True, False)], ids=["no terminal", "no bar"])
def test_without_a_bar_there_are_lines_alone(terminal: bool, moving: bool) -> None:
    assert screen(200, terminal=terminal, moving=moving) == (
        "step 1234/2000 · loss 11.2426 · lr 1.0e-03 · tok/s 1,689 · fill 95.5% · peak GiB 12.50\n"
    )
