"""Phases: one moving line each on a terminal, plain lines elsewhere, nothing left behind."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from deltatune.phases import phase, shown_by
from deltatune.training import phase_lines
from deltatune.training.console import RunConsole

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def console(width: int = 80, *, terminal: bool = True, moving: bool = True) -> tuple[RunConsole, io.StringIO]:
    file = io.StringIO()
    screen = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    return RunConsole(screen, moving=moving), file


def lines(file: io.StringIO) -> list[str]:
    return [line for line in ESCAPE.sub("\n", file.getvalue()).splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_lines_of_phases_inside_each_other_fit_and_keep_their_figures(width: int) -> None:
    shown, file = console(width)
    name = "compiling linear_attention_Qwen3_5MLP (no grad), graph 1 of 2, and more than fits on a line"
    training = shown.moving_phase("training", 2000, 1234)
    with training, shown_by(shown.phase), phase("evaluating", 120) as advance, phase(name):
        advance(60)
        time.sleep(0.6)
    found = lines(file)
    assert all(len(line) <= width for line in found)
    last = {word: [line for line in found if word in line][-1] for word in ("training", "evaluating", "compiling")}
    assert re.search(r"training ━{10}─{6} 1234/2000 0:00:00 left -:--:--$", last["training"].rstrip())
    assert re.search(r" 60/120 0:00:00 left \S+$", last["evaluating"].rstrip())
    assert re.search(r" 0:00:00$", last["compiling"].rstrip())
    assert ("…" in last["compiling"]) == (width < 120)


def test_a_phase_takes_its_line_away_and_what_is_said_stays() -> None:
    shown, file = console()
    for number in range(2):
        with shown.phase("loading"):
            shown.out(f"said {number}")
        shown.out(f"afterwards {number}")
    text = file.getvalue()
    assert text.rstrip().endswith("afterwards 1")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2, "the cursor is hidden and comes back"
    after = text[text.index("afterwards 0") :]
    up = re.findall(r"\x1b\[(\d*)A", after[: after.index("said 1")])
    assert up == [], "a new line never goes over what was said since the last one"


def test_a_phase_inside_another_takes_its_line_away_alone() -> None:
    shown, file = console()
    with shown.phase("training"):
        with shown.phase("evaluating"):
            pass
        so_far = len(file.getvalue())
        time.sleep(0.6)
        since = file.getvalue()[so_far:]
    assert "training" in since
    assert "evaluating" not in since


def failing(num_threads: int) -> None:
    assert num_threads > 1
    raise ZeroDivisionError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_phase_ends_with_an_exception(terminal: bool) -> None:
    shown, _ = console(terminal=terminal)
    with pytest.raises(ZeroDivisionError), shown.phase("loading"):
        failing(threading.active_count())


def test_on_a_pipe_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_lines, "_FIRST", 0.2)
    monkeypatch.setattr(phase_lines, "_EVERY", 0.4)
    shown, file = console(terminal=False)
    with shown.phase("short"):
        pass
    with shown.phase("tokenising", 7) as advance:
        advance(3)
        time.sleep(0.35)
        advance(5)
        time.sleep(0.4)
    assert lines(file) == ["tokenising 3/7, for 0 s", "tokenising 5/7, for 1 s"]


@pytest.mark.parametrize("terminal", [True, False])
def test_without_progress_nothing_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_lines, "_FIRST", 0.01)
    shown, file = console(terminal=terminal, moving=False)
    with shown.phase("loading"), shown.moving_phase("training", 3):
        time.sleep(0.2)
    assert file.getvalue() == ""


def test_a_phase_that_nobody_shows_costs_nothing() -> None:
    with phase("loading", 3) as advance:
        advance(2)
