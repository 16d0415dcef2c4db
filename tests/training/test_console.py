"""What the console says is in train.log, of all legs, without what is drawn over itself."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from deltatune.training.console import RunConsole
from deltatune.training.progress import ProgressBar


def test_lines_are_kept_from_the_beginning_and_of_every_leg(tmp_path: Path) -> None:
    for leg in ("first", "second"):
        screen = io.StringIO()
        console = RunConsole(Console(file=screen, width=20))
        console.out(f"{leg}: [bold]before the folder[/bold], and wider than the screen is")
        assert (tmp_path / "train.log").exists() == (leg == "second")
        console.keep_in(tmp_path)
        console.out("line\nand another")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.startswith("=== 20") for line in lines] == [True, False, False, False] * 2
    assert lines[5] == "second: [bold]before the folder[/bold], and wider than the screen is"
    assert lines[6:] == ["line", "and another"]


def test_steps_are_kept_whole_and_the_bar_is_not(tmp_path: Path) -> None:
    console = RunConsole(Console(file=io.StringIO(), width=40, force_terminal=True))
    console.keep_in(tmp_path)
    bar, state = ProgressBar(console), SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=0)
    nothing: Any = None
    bar.on_train_begin(nothing, state, nothing)
    state.global_step = 3
    bar.on_step_end(nothing, state, nothing)
    bar.on_log(nothing, state, nothing, {"loss": 2.0, "tokens_per_second": 1689.0, "peak_memory_gib": 12.5})
    bar.close()
    _, *lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines == ["step 3/9 · loss 2.0000 · tok/s 1,689 · peak GiB 12.50"]


def test_names_of_files_may_hold_any_bytes(tmp_path: Path) -> None:
    console = RunConsole(Console(quiet=True))
    console.keep_in(tmp_path)
    console.keep("caf\udce9.yaml")
    assert (tmp_path / "train.log").read_text().endswith("caf\\udce9.yaml\n")
