"""Standard output whose reader is gone: short commands end as other tools do, and a run goes on without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from deltatune import cli
from deltatune.pipes import discard, is_unread
from deltatune.training.console import RunConsole, Screen


@pytest.fixture
def pipe() -> Iterator[tuple[IO[str], IO[str]]]:
    """The end that is read, and the end that is written to."""
    read, write = os.pipe()
    with os.fdopen(read) as reader, os.fdopen(write, "w") as writer:
        yield reader, writer
        if is_unread(writer):
            discard(writer)


def test_a_pipe_is_unread_once_its_reader_is_gone(pipe: tuple[IO[str], IO[str]], tmp_path: Path) -> None:
    reader, writer = pipe
    assert not is_unread(writer)
    reader.close()
    assert is_unread(writer)
    discard(writer)
    writer.write("nowhere")
    writer.flush()
    assert not is_unread(writer)
    assert not is_unread(None)
    with (tmp_path / "file").open("w") as file:
        assert not is_unread(file)


def test_a_console_goes_on_and_its_lines_are_kept(
    pipe: tuple[IO[str], IO[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = pipe
    console = RunConsole(Screen(file=writer))
    console.keep_in(tmp_path)
    console.out("first")
    assert reader.readline() == "first\n"
    reader.close()
    for line in ("second", "third"):
        console.out(line)
    _, *lines = (tmp_path / "train.log").read_text().splitlines()
    (said,) = capsys.readouterr().err.splitlines()
    assert "the run goes on" in said
    assert lines == ["first", said, "second", "third"]


def piped(words: list[str], *, both: bool = False) -> tuple[int, str]:
    """The status of a command whose first line alone is read, and its error output, which may go the same way."""
    command = [sys.executable, "-m", "deltatune", *words]
    to = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=to, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = "" if process.stderr is None else process.stderr.read()
        return process.wait(timeout=120), said


@pytest.mark.parametrize("both", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_goes_on_and_ends_well(write_recipe: Callable[[], Path], tmp_path: Path, both: bool) -> None:
    status, said = piped(["train", str(write_recipe())], both=both)
    assert status == 0
    assert both or said.count("nobody reads the standard output any more; the run goes on") == 1
    assert "Traceback" not in said
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "finished"
    log = (tmp_path / "output" / "train.log").read_text()
    assert log.count("nobody reads the standard output any more") == 1
    assert log.endswith(f"saved to {tmp_path / 'output'}\n")


def unread(*words: str) -> tuple[int, str]:
    """The status and the error output of a command that nobody listens to from the start."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "deltatune", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    return done.returncode, done.stderr


def test_another_command_ends_in_silence(write_recipe: Callable[[], Path]) -> None:
    assert unread("preprocess", str(write_recipe()), "--show", "20") == (141, "")


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"]])
def test_help_that_nobody_reads_says_nothing(words: list[str]) -> None:
    assert unread(*words) == (0, "")


def test_a_broken_pipe_elsewhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def broken(_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_command", broken)
    assert cli.main(["doctor"]) == 2
    assert "Broken pipe" in capsys.readouterr().err
