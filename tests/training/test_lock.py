"""One run in a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deltatune.errors import UserError
from deltatune.training import lock
from deltatune.training.lock import check_free, clear_stale, locked
from deltatune.training.processes import started


def test_a_folder_is_held_and_let_go(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / ".lock").read_text())
        assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
        with (
            pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*; wait for it"),
            locked(tmp_path / "run"),
        ):
            pass
    assert not list((tmp_path / "run").iterdir())


def test_the_lock_of_whoever_has_taken_the_folder_since_stays(tmp_path: Path) -> None:
    """As after its user removed a lock of which another run was still the holder."""
    theirs = json.dumps({"pid": 1, "host": "elsewhere", "started": None})
    with locked(tmp_path):
        (tmp_path / ".lock").write_text(theirs)
    assert (tmp_path / ".lock").read_text() == theirs


def test_a_run_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_process_holds_while_it_runs(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        holder = {"pid": other.pid, "host": socket.gethostname(), "started": started(other.pid)}
        (tmp_path / ".lock").write_text(json.dumps(holder))
        with pytest.raises(UserError, match=f"process {other.pid}"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "holder",
    [
        "",
        "[]",
        *(json.dumps({"pid": pid, "host": socket.gethostname(), "started": "1"}) for pid in (os.getppid(), 10**30, -1)),
    ],
    ids=["empty", "broken", "the number of another process", "too large a number", "a group of processes"],
)
def test_a_stale_lock_is_taken_over(tmp_path: Path, holder: str) -> None:
    (tmp_path / ".lock").write_text(holder)
    os.utime(tmp_path / ".lock", (1, 1))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_stale_lock_is_cleared_and_one_that_is_held_stays(tmp_path: Path) -> None:
    clear_stale(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "started": "1"}))
    clear_stale(tmp_path)
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        with pytest.raises(UserError, match="is in use"):
            clear_stale(tmp_path)
        assert (tmp_path / ".lock").exists()


def test_a_lock_that_is_being_written_holds(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    holder = json.dumps({"pid": 1, "host": "elsewhere", "started": None})
    writer = threading.Timer(0.2, (tmp_path / ".lock").write_text, (holder,))
    writer.start()
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"), locked(tmp_path):
        pass
    writer.join()


def test_a_lock_that_nobody_goes_on_writing_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WRITING", 0.3)
    (tmp_path / ".lock").write_text("")
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_takes_no_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be written: Is a directory; make room, or"), locked(tmp_path):
        pass


@pytest.mark.parametrize("what", ["a folder", "a link to nothing"])
def test_what_is_no_lock_is_named_and_not_waited_for(tmp_path: Path, what: str) -> None:
    if what == "a folder":
        (tmp_path / ".lock").mkdir()
    else:
        (tmp_path / ".lock").symlink_to(tmp_path / "gone" / "lock")
    with pytest.raises(UserError, match=rf"\.lock is {what}, and a run's lock is a file; remove it, or choose another"):
        check_free(tmp_path)
    with pytest.raises(UserError, match=r"\.lock "), locked(tmp_path):
        pass


def test_an_empty_lock_of_a_clock_that_is_ahead_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_WRITING", 0.3)
    (tmp_path / ".lock").write_text("")
    os.utime(tmp_path / ".lock", (time.time() + 60,) * 2)
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 10


def test_a_lock_that_another_process_looks_at_is_waited_for(tmp_path: Path) -> None:
    """Two that find a lock stale would otherwise both take it over."""
    gone = {"pid": 2**31 - 2, "host": socket.gethostname(), "started": 1}
    (tmp_path / ".lock").write_text(json.dumps(gone))
    holding, held = threading.Event(), []

    def hold() -> None:
        with locked(tmp_path):
            holding.set()

    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=hold)
        thread.start()
        held.append(holding.wait(0.5))
    held.append(holding.wait(10))
    thread.join()
    assert held == [False, True]


def test_of_another_host_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": None}))
    with (
        pytest.raises(UserError, match=r"process 1 on elsewhere; .*, or remove .*\.lock if that run is gone"),
        locked(tmp_path),
    ):
        pass


_CONTENDER = """\
import sys, time
from pathlib import Path
from deltatune.errors import UserError
from deltatune.training.lock import locked
print(flush=True)
sys.stdin.readline()
try:
    with locked(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("stale", [True, False], ids=["stale", "none"])
def test_of_several_at_once_one_holds(tmp_path: Path, stale: bool) -> None:
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        if stale:
            gone = {"pid": os.getppid(), "host": socket.gethostname(), "started": "1"}
            (folder / ".lock").write_text(json.dumps(gone))
        command = [sys.executable, "-c", _CONTENDER, str(folder)]
        contenders = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(4)]
        for contender in contenders:
            contender.stdout.readline()  # type: ignore[union-attr]
        for contender in contenders:
            print(file=contender.stdin, flush=True)
        said = [contender.stdout.readline().strip() for contender in contenders]  # type: ignore[union-attr]
        for contender in contenders:
            contender.communicate("\n")
        assert sorted(said) == ["holds", "refused", "refused", "refused"]
        assert not list(folder.iterdir())


def test_a_lock_that_was_taken_over_while_one_looked_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at a stale lock and writing, another process takes it over and the system has no locks."""
    other = json.dumps({"pid": 1, "host": "elsewhere", "started": None})
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "started": "1"}))
    looked = lock.check_free

    def replaced(*given: object) -> None:
        looked(*given)  # type: ignore[arg-type]
        monkeypatch.setattr(lock, "check_free", looked)
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text(other)

    monkeypatch.setattr(lock, "check_free", replaced)
    with pytest.raises(UserError, match="process 1 on elsewhere"), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == other


def test_a_lock_that_was_slow_to_be_written_is_not_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the file for one that nobody goes on writing, and its holder ran."""
    other = json.dumps({"pid": 1, "host": "elsewhere", "started": None})
    monkeypatch.setattr(lock, "_wait_for", lambda _: (tmp_path / ".lock").write_text(other))
    with pytest.raises(UserError, match="process 1 on elsewhere"), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == other
