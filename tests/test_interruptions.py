"""The scope of SIGTERM and Ctrl-C around a command, in processes that import nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BEGIN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
from deltatune import signals
from deltatune.phases import phase
from deltatune.signals import Interruption, interruptible, kept_by, noted
def kill(number=signal.SIGTERM): os.kill(os.getpid(), number)
"""
# a mutex that this thread holds: no signal wakes it
STUCK = """
import ctypes
mutex = ctypes.create_string_buffer(64)
wait = lambda: ctypes.CDLL(None).pthread_mutex_lock(mutex)
wait()
def later(*seconds):
    import threading
    for each in seconds: threading.Timer(each, kill).start()
"""


def ended(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_becomes_one_line_with_the_innermost_phase_and_what_is_kept(name: str, status: int) -> None:
    code = f"""
try:
    with interruptible(), kept_by(lambda: "outer"), kept_by(lambda: "nothing; start again"), phase("loading"):
        with phase("reading"): kill(signal.{name})
except Interruption as error:
    print(error, error.status)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    expected = f"{name}: interrupted while reading: nothing; start again {status}\n"
    assert ended(code) == (0, expected, "")


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = """
with interruptible():
    try: kill()
    finally:
        kill()
        print("never")
"""
    assert ended(code) == (143, "", "SIGTERM: ended at once\n")


def test_what_notes_the_first_leaves_the_second() -> None:
    code = """
with interruptible():
    try:
        with noted(print):
            kill()
            print("goes on")
            kill(signal.SIGINT)
    except Interruption as error: print(error)
"""
    assert ended(code) == (0, "15\ngoes on\nSIGINT: interrupted\n", "")


def test_a_signal_that_is_ignored_stays_so() -> None:
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interruptible(), noted(print): kill(signal.SIGINT)
"""
    assert ended(code) == (0, "", "")


@pytest.mark.parametrize(
    ("around", "seconds", "settings"),
    [("interruptible()", "0.3", "_WAITING"), ("interruptible(), noted(print)", "0.3, 0.5", "_LEAVING")],
)
def test_a_process_that_takes_up_no_signal_is_ended(around: str, seconds: str, settings: str) -> None:
    code = f"{STUCK}\nsignals.{settings} = 0.3\nwith {around}:\n    later({seconds})\n    wait()"
    began = time.monotonic()
    assert ended(code) == (143, "", "SIGTERM: ended at once\n")
    assert time.monotonic() - began < 5


def test_work_that_notes_the_first_signal_has_time() -> None:
    code = f"{STUCK}\nsignals._WAITING = 0.1\nwith interruptible(), noted(print):\n    later(0.2)\n    time.sleep(1)"
    assert ended(code) == (0, "15\n", "")


def test_what_the_scope_took_is_given_back() -> None:
    code = """
hook = sys.unraisablehook = lambda found: None
read, write = os.pipe()
os.set_blocking(write, False)
signal.set_wakeup_fd(write)
with interruptible(): pass
assert sys.unraisablehook is hook
assert signal.set_wakeup_fd(-1) == write
"""
    assert ended(code) == (0, "", "")


def test_what_counts_no_signals_is_over_at_its_end() -> None:
    code = f"""{STUCK}
signals._WAITING = 0.3
with interruptible():
    with signals.unwatched(): pass
    later(0.3)
    wait()
"""
    assert ended(code) == (143, "", "SIGTERM: ended at once\n")


def test_one_that_python_drops_in_a_destructor_comes_again() -> None:
    code = """
class Dies:
    def __del__(self): kill()
try:
    with interruptible():
        Dies()
        print("dropped", flush=True)
        time.sleep(20)
except Interruption as error: print(error)
"""
    assert ended(code) == (0, "dropped\nSIGTERM: interrupted\n", "")


@pytest.mark.parametrize(
    "drops",
    [
        "try: kill()\nexcept BaseException: pass",
        # C code that asks for an attribute, and takes every error for its absence
        "from ctypes import pythonapi, py_object\nclass Odd:\n    def __getattr__(self, name): kill()\n"
        "pythonapi.PyObject_HasAttrString(py_object(Odd()), b'name')",
        "try:\n    try: kill()\n    except BaseException as error: raise ImportError from error\n"
        "except ImportError: pass",
    ],
)
def test_one_that_a_library_drops_comes_again(drops: str) -> None:
    code = f"""
def drop():
{textwrap.indent(drops, "    ")}
try:
    with interruptible(), kept_by(lambda: "nothing"):
        drop()
        print("dropped", flush=True)
        time.sleep(20)
except Interruption as error: print(error)
"""
    assert ended(code) == (0, "dropped\nSIGTERM: interrupted: nothing\n", "")


def test_one_that_is_answered_does_not() -> None:
    code = """
from deltatune import cli
interrupt = signals._Scope.interrupt
signals._Scope.interrupt = lambda *given: (print("came"), interrupt(*given))
class Slow:
    def __del__(self): time.sleep(0.3)  # as its frames go
def run(_):
    slow = Slow()
    kill()
cli._parser = lambda: type("Parser", (), {"parse_args": staticmethod(run)})
print(cli.main([]))
"""
    assert ended(code) == (0, "came\n143\n", "SIGTERM: interrupted\n")


def test_forked_processes_leave_ctrl_c_and_end_without_a_word() -> None:
    code = """
with interruptible():
    child = os.fork()
    if child == 0:
        kill(signal.SIGINT)
        print("lives on", flush=True)
        kill()
    print(os.waitpid(child, 0)[1])
    time.sleep(0.2)
"""
    assert ended(code) == (0, "lives on\n15\n", "")


def test_what_a_process_forked_goes_with_it() -> None:
    code = """
import multiprocessing
with interruptible():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    try: kill()
    finally: kill()
"""
    status, out, _ = ended(code)
    assert status == 143
    until, child = time.monotonic() + 5, Path("/proc", out.strip(), "stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it still runs"


def test_an_error_that_python_makes_of_it_is_it() -> None:
    """What a class is told of its attributes raises a RuntimeError of Python's, as imports see it."""
    code = """
class Named:
    def __set_name__(self, owner, name): kill()
try:
    with interruptible(), kept_by(lambda: "nothing"), phase("importing"):
        class Owner: field = Named()
except Interruption as error: print(error)
"""
    assert ended(code) == (0, "SIGTERM: interrupted while importing: nothing\n", "")


def test_a_signal_as_the_scope_ends_changes_nothing() -> None:
    code = """
import threading
join = threading.Thread.join
threading.Thread.join = lambda self, *rest: (kill(), time.sleep(0.1), join(self, *rest))
with interruptible(): print("done")
"""
    assert ended(code) == (0, "done\n", "")


def test_a_signal_after_the_command_changes_nothing() -> None:
    code = """
import atexit
from deltatune import cli
atexit.register(lambda: (kill(), time.sleep(0.1)))
class Late:
    def __del__(self): kill()  # as Python ends, which has taken handlers back by then
sys.late = Late()
cli._main = lambda _: print("done") or 2
sys.exit(cli.main())
"""
    assert ended(code) == (2, "done\n", "")


def test_a_command_needs_no_standard_output_and_no_main_thread() -> None:
    code = """
import threading
from deltatune import cli
cli._main = lambda _: 2
sys.stdout = None
found = []
thread = threading.Thread(target=lambda: found.append(cli.main()))
thread.start()
thread.join()
assert found == [2]
sys.exit(cli.main())
"""
    assert ended(code) == (2, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
def test_a_process_that_loads_data_does_not_outlive_a_killed_parent() -> None:
    program = """
import os, signal, time
from deltatune.signals import leave_signals_to_parent

read, write = os.pipe()
if os.fork() == 0:
    leave_signals_to_parent(0)
    os.write(write, b".")
    time.sleep(60)
os.read(read, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # what is printed ends with the last process that could print: the worker
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=30, check=False)
    assert ended.returncode == -9


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells who sent a signal")
def test_a_process_that_loads_data_ends_by_its_parent_alone() -> None:
    code = """
from deltatune.signals import leave_signals_to_parent
read, write = os.pipe()
if (worker := os.fork()) == 0:
    leave_signals_to_parent(0)
    os.write(write, b".")
    time.sleep(20)
    os._exit(1)
os.read(read, 1)
if os.fork() == 0:  # somebody else
    os.kill(worker, signal.SIGTERM)
    os._exit(0)
time.sleep(0.3)
assert os.waitpid(worker, os.WNOHANG) == (0, 0), "it lives"
os.kill(worker, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
"""
    assert ended(code) == (0, "0\n", "")
