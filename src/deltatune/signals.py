"""SIGTERM and Ctrl-C while a command runs: the first ends it with a word and a status, the second at once.

One scope around the command turns the first signal into an ``Interruption`` of the main thread. As it leaves, files
that are not whole go, workers end, and those who know say what was interrupted and what is kept. Work that has to come
to its end first, a training step or a save, notes the signal instead; then the next one is the Interruption.

Python runs handlers between two of its own instructions alone. Where the main thread waits elsewhere, for a device or
another rank, a thread of the scope ends the process some seconds after the first signal, or where that is only noted
after the second.
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

__all__ = [
    "Interruption",
    "done_with_signals",
    "interruptible",
    "kept_by",
    "leave_signals_to_parent",
    "noted",
    "told",
    "unwatched",
]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_WAITING: Final = 10.0  # seconds in which the main thread has to take up a signal
_LEAVING: Final = 4.0  # seconds that it has after a second one
_AGAIN: Final = 0.05  # seconds until an Interruption that was lost comes again
_DIES_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG of Linux
# what the scope says to its thread, where the system writes numbers of signals
_END, _LOST = 0, 255


class Interruption(KeyboardInterrupt):
    """A signal has ended a command; its message is one line.

    Attributes:
        number: of the signal.
        after: where the command was, such as ``"after step 3"``; set by those who know.
        phase: the innermost phase that it came in.
        kept: what is on the disk and what goes on from it; set by those who know.
        answered: whether somebody has ended the command by it.

    Args:
        number: as above.
        drop: is called where it is gone without an answer, as where a library catches every error.
    """

    def __init__(self, number: int, drop: Callable[[], object] | None = None) -> None:
        super().__init__(number)
        self.number = number
        self.after: str | None = None
        self.phase: str | None = None
        self.kept: str | None = None
        self.answered = False
        self._drop = drop

    def __del__(self) -> None:
        """Nobody holds it any more."""
        if self._drop is not None and not self.answered:
            self._drop()

    @property
    def status(self) -> int:
        """The exit status of the command: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number

    def __str__(self) -> str:
        """One line."""
        place = "".join([f" {self.after}" if self.after else "", f" while {self.phase}" if self.phase else ""])
        return f"{signal.Signals(self.number).name}: interrupted{place}{f': {self.kept}' if self.kept else ''}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT raises an Interruption, and one that follows it ends the process.

    Signals that are ignored stay so, and outside the main thread, where Python takes no handlers, all act as ever.
    Processes that are forked within leave Ctrl-C to this one, and end by SIGTERM without a word.

    Raises:
        Interruption: a signal came.
    """
    if not _in_main_thread():
        yield
        return
    scope = _Scope()
    with _handlers(scope.interrupt), scope.watched():
        yield


@contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT is given to ``note``; the next acts as it would without this."""
    if not _in_main_thread():
        yield
        return

    def take(number: int, restore: Callable[[], None]) -> None:
        restore()
        note(number)

    with _handlers(take), ExitStack() as stack:
        for scope in _active:
            stack.enter_context(scope.patient())
        yield


def done_with_signals() -> None:
    """From here on signals change nothing: the command is over, and Python ends with its status.

    They are ignored, since as Python ends it takes handlers back before libraries are gone.
    """
    if _in_main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def leave_signals_to_parent(_worker: int) -> None:
    """In a process that loads data, which ends with its parent: the step that waits for it comes to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # of SIGTERM the parent's own alone ends this process, by a thread that learns who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, name="signals", daemon=True).start()
        # where the parent is killed, torch's own watch leaves a worker that waits for someone to read what it loaded;
        # one that a server has forked has that for its parent
        if os.getppid() == _parent():
            ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != _parent():
        pass
    os._exit(0)  # as torch's own handler: other statuses are errors to it


def _parent() -> int:
    """The process that reads what this one loads."""
    multiprocessing = sys.modules.get("multiprocessing")
    process = multiprocessing.parent_process() if multiprocessing else None
    return os.getppid() if process is None else int(process.pid)


@contextmanager
def kept_by(say: Callable[[], str]) -> Iterator[None]:
    """An Interruption that leaves the block tells what is kept, unless it does already."""
    with told(lambda error: setattr(error, "kept", error.kept or say())):
        yield


@contextmanager
def told(tell: Callable[[Interruption], object]) -> Iterator[None]:
    """Gives ``tell`` an Interruption that leaves the block, also where Python or a library made another error of it."""
    try:
        yield
    except BaseException as error:
        found = _behind(error)
        if found is None:
            raise
        tell(found)
        if found is error:
            raise
        raise found from None


def _behind(error: BaseException | None) -> Interruption | None:
    while error is not None and not isinstance(error, Interruption):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def unwatched() -> Iterator[None]:
    """Within, the scope's thread counts no signals: handlers of their own decide how long the process has."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


def _main_thread() -> int:
    found = threading.main_thread().ident
    assert found is not None, "it runs"
    return found


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handlers(handler: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Puts one handler in the place of those of both signals; it gets the number, and what puts the others back."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: found for number, found in before.items() if found is not signal.SIG_IGN}

    def restore() -> None:
        for number, found in before.items():
            signal.signal(number, found)

    for number in before:
        signal.signal(number, lambda number, _frame: handler(number, restore))
    try:
        yield
    finally:
        restore()


class _Scope:
    """The signals of a command."""

    def __init__(self) -> None:
        self._count, self._number = 0, 0  # of signals so far; the last one
        self._raised = self._patient = self._over = False
        self._read = self._write = -1

    def interrupt(self, number: int, _restore: Callable[[], None]) -> None:
        """The handler."""
        if self._over:
            return
        if self._raised:
            _end_at_once(number)
        self._raised, self._number = True, number
        # without a name here: its traceback would hold it
        raise Interruption(number, self._drop)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within, the first signal has time."""
        before, self._patient = self._patient, True
        try:
            yield
        finally:
            self._patient = before

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, a thread ends the process where its main thread does not."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        hook, sys.unraisablehook = sys.unraisablehook, self._take_unraisable
        self._hook = hook
        thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        thread.start()
        _active.append(self)
        _tell_forks()
        try:
            yield
        finally:
            self._over = True  # what comes now, or comes again, finds nothing to end
            _active.remove(self)
            sys.unraisablehook = hook
            signal.set_wakeup_fd(wakeup)
            os.write(self._write, bytes([_END]))
            thread.join()
            self._close()

    def _close(self) -> None:
        for end in (self._read, self._write):
            os.close(end)

    def _drop(self) -> None:
        """An Interruption that Python or a library has dropped comes again."""
        if not self._over:
            os.write(self._write, bytes([_LOST]))

    def _take_unraisable(self, found: Any) -> None:
        """One that came in a destructor, where Python drops exceptions, needs no traceback on the screen."""
        if not isinstance(found.exc_value, Interruption):
            self._hook(found)

    def _watch(self) -> None:
        until: float | None = None
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                if self._count > 1 or not (self._raised or self._patient):
                    _end_at_once(self._number)
                until = None
                continue
            seen = self._count
            for byte in os.read(self._read, 64):
                if byte == _END:
                    return
                if byte == _LOST:
                    self._come_again()
                elif byte in _SIGNALS:
                    self._count, self._number = self._count + 1, byte
            if self._count > seen and seen < 2:
                until = time.monotonic() + (_LEAVING if self._count > 1 else _WAITING)

    def _come_again(self) -> None:
        time.sleep(_AGAIN)
        self._count -= 1
        self._raised = False
        signal.pthread_kill(_main_thread(), self._number)

    def leave_to_parent(self) -> None:
        """In a forked process: Ctrl-C is for the one that waits for it, and SIGTERM ends it without a word."""
        signal.set_wakeup_fd(-1)
        self._over = True
        sys.unraisablehook = self._hook
        self._close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_active: list[_Scope] = []


@functools.cache
def _tell_forks() -> None:
    """Once a process: what Python calls in those that it forks."""
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    while _active:
        _active.pop().leave_to_parent()


def _end_at_once(number: int) -> None:
    """Ends this process and those that it forked."""
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else []:
        child.kill()
    with suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: ended at once\n".encode())
    os._exit(128 + number)
