"""What happens when one of several ranks fails, ends or stops: all end, and one of them says which it was.

Each rank has two threads beside its run: a ``Heartbeat`` and a watch over what it hears. The rank that failed tells the
others why. An error that others get because of it (a connection that was closed by a peer) gives way to that cause. A
rank that can say nothing is missed: on the same machine within seconds if its process is gone, elsewhere or stopped
when nothing was heard of it for ``parallel.timeout_s`` seconds. The main thread of a rank may wait for a device or a
peer and never return: then the watch ends the process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deltatune.config.schema import Recipe
from deltatune.errors import InterruptedRunError, RankFailedError, is_users, one_line, user_path
from deltatune.signals import Interruption
from deltatune.training.console import LOG_FILE
from deltatune.training.heartbeat import BEAT, Failure, Heartbeat, connect, launcher_hosts
from deltatune.training.processes import Process
from deltatune.training.provenance import now
from deltatune.training.record import mark_ended
from deltatune.training.sealed import CHECKPOINT, steps_of

__all__ = ["RankWatch", "explained", "watched"]

_GRACE = 3.0  # seconds in which the main thread may find the failure by itself
_LEAVING = 20.0  # seconds that leaving may take
_TELLING = 5.0  # seconds that other ranks wait for a failure to be shown


def watched(recipe: Recipe, rank: int, size: int) -> AbstractContextManager[RankWatch | None]:
    """Watches over the ranks of a run while it lasts; a run of one process has nobody to watch."""
    if size == 1:
        return nullcontext()
    timeout_s = recipe.parallel.timeout_s
    heart = Heartbeat(connect(timeout_s), rank, size)
    return _running(RankWatch(heart, rank, size, timeout_s, user_path(recipe.training.output_dir)))


@contextmanager
def explained(watch: RankWatch | None) -> Iterator[None]:
    """Within, an error that another rank's failure led to becomes that failure, and this rank's own is told to all."""
    try:
        yield
    except (Exception, Interruption) as error:
        cause = error if watch is None else watch.explain(error)
        if cause is error:
            raise
        raise cause from None


@contextmanager
def _running(watch: RankWatch) -> Iterator[RankWatch]:
    watch.start()
    try:
        with explained(watch), _left_together(watch):
            yield watch
    except InterruptedRunError:
        raise
    except RankFailedError as error:
        watch.show(str(error))
        raise
    except (Exception, Interruption):
        watch.linger()
        raise
    finally:
        watch.stop()


@contextmanager
def _left_together(watch: RankWatch) -> Iterator[None]:
    """Ends well when all ranks do, which by a signal is after the same step."""
    try:
        yield
    except InterruptedRunError:
        watch.leave()
        raise
    watch.leave()


class RankWatch:
    """The other ranks, as one of them hears of them.

    Args:
        heart: of this rank; not started.
        rank, size: this process, and how many there are.
        timeout_s: seconds without a sign of life after which a rank is lost.
        output_dir: where the run's records are.
    """

    def __init__(self, heart: Heartbeat, rank: int, size: int, timeout_s: float, output_dir: Path) -> None:
        self._heart, self._rank, self._size, self._timeout_s = heart, rank, size, timeout_s
        self._output_dir, self._began = output_dir, now()
        self._failure: Failure | None = None
        self._explained: BaseException | None = None  # this rank's own error, once it was told
        self._sigterm: Any = None  # what SIGTERM did before
        # one of the two threads ends the run
        self._deciding, self._watch_ends = threading.Lock(), False
        self._found, self._leaving, self._left = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)

    def start(self) -> None:
        """Begins to give and look for signs of life."""
        self._heart.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends both threads."""
        self._left.set()
        self._heart.stop()
        self._thread.join(2 * BEAT)
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)

    # The main thread

    def explain(self, error: BaseException) -> BaseException:
        """The error to go on with: the failure of another rank where that came first, else this one, told to all."""
        if error is self._explained or isinstance(error, InterruptedRunError | RankFailedError):
            return error
        self._ignore_sigterm()
        if _is_of_a_connection(error):
            # who has closed it is found out within the time in which any lost rank is
            self._found.wait(self._timeout_s + 2 * _GRACE)
        self._take_over()
        if self._failure is None:
            self._heart.report(self._own(error))
            if self._rank == 0 and isinstance(error, Interruption):
                self._heart.tell(str(error))  # which is said as this rank ends
            self._wait_for_store(_TELLING)
        self._failure = failure = self._failure or self._heart.failure
        # rank 0 speaks for itself, also where another met with the same before; a signal mostly comes to all
        same = failure is not None and (failure.rank == 0 or failure.summary == self._own(error).summary)
        if failure is None or (self._rank == 0 and same) or isinstance(error, Interruption):
            self._explained = error
            return error
        return self._failed(failure)

    def _take_over(self) -> None:
        """The main thread ends the run; it does not return if the watch already does."""
        with self._deciding:
            if not self._watch_ends:
                self._leaving.set()
        if self._watch_ends:
            threading.Event().wait()

    def _ignore_sigterm(self) -> None:
        """This process ends anyway: a launcher's word that it should must not come before its own."""
        if threading.current_thread() is threading.main_thread():
            self._sigterm = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave(self) -> None:
        """Waits until all ranks have ended well.

        Raises:
            RankFailedError: one has not.
        """
        self._heart.end()
        while not self._heart.all_ended.wait(BEAT / 10) and not self._heart.ended_with_store:
            if self._failure is not None:
                self._take_over()
                raise self._failed(self._failure)

    def show(self, text: str) -> None:
        """Shows a failure, if it is for this rank to do; or waits until it was shown."""
        if self._shows():
            self._say(text)
        else:
            self.linger()
        # not before: a launcher that sees a rank killed ends all others
        failure = self._failure
        if failure is not None and failure.lost and failure.process is not None and failure.rank != self._rank:
            failure.process.kill()

    def _say(self, text: str) -> None:
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
        if self._rank != 0 or self._watch_ends:
            self._write_down(text)
        self._heart.tell(text)
        self._wait_for_store(_TELLING)
        if not launcher_hosts():
            time.sleep(2 * BEAT)  # others hear it before the store goes with this process

    def _wait_for_store(self, seconds: float) -> None:
        """Waits until the store has taken and told what there was; it has the time that a rank has, and no more."""
        left = self._heart.answered + self._timeout_s - time.monotonic()
        self._heart.wait_for_turn(min(seconds, max(0.0, left)))

    def linger(self) -> None:
        """Waits until a failure was shown: a launcher ends all ranks when the first one exits."""
        seconds = _TELLING if self._rank else 0 if launcher_hosts() else 2 * BEAT
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._heart.broken and not self._heart.is_told.wait(BEAT / 10):
            pass

    # The watch

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._left.wait(BEAT):
            at, before = before, time.monotonic()
            if before - at > 3 * BEAT:  # stopped, suspended, or out of the interpreter for long
                self._heart.excuse(before - at - BEAT)
            failure = self._heart.failure or self._lost()
            if failure is not None:
                self._settle(failure)
                return

    def _lost(self) -> Failure | None:
        """A rank that is missed, or the store."""
        found = self._missed()
        if found is None or self._left.is_set():
            return None
        # it may have said why before it went, or have ended well with all others
        self._wait_for_store(self._timeout_s)
        if self._heart.all_ended.is_set() or self._heart.ended_with_store:
            return None
        if self._heart.failure is None:
            self._heart.report(found)
            self._wait_for_store(2 * BEAT)
        return self._heart.failure or found

    def _missed(self) -> Failure | None:
        heart, at = self._heart, time.monotonic()
        silent = f"nothing was heard of it for {self._timeout_s:g} s"
        # a dead launcher is known by its store alone
        host = None if launcher_hosts() else 0
        for rank, process in list(heart.processes.items()):  # another thread adds to them
            if process.is_gone:
                return self._lost_rank(rank, "its process is gone")
        if heart.broken:
            return self._lost_rank(host, f"its store is gone ({heart.broken})")
        if at - heart.answered > self._timeout_s:
            return self._lost_rank(host, silent)
        # while the store is late, nothing is known of the others
        if at - heart.answered < self._timeout_s / 2:
            for rank, heard in heart.heard.items():
                if at - heard > self._timeout_s:
                    return self._lost_rank(rank, silent)
        return None

    def _lost_rank(self, rank: int | None, why: str) -> Failure:
        process = None if rank is None else self._heart.processes.get(rank)
        return Failure(rank, process, f"was lost: {why}", lost=True)

    def _settle(self, failure: Failure) -> None:
        """Lets the main thread end the run by the failure, or does it instead."""
        self._failure = failure
        self._found.set()
        self._leaving.wait(_GRACE)
        with self._deciding:
            self._watch_ends = not self._leaving.is_set()
        if not self._watch_ends and self._left.wait(_LEAVING):
            return
        self.show(str(self._failed(failure)))
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(failure.status)

    # What is said

    def _own(self, error: BaseException) -> Failure:
        if isinstance(error, Interruption):
            return Failure(self._rank, Process.this(), one_line(error), status=error.status, is_users=True)
        if is_users(error):
            return Failure(self._rank, Process.this(), one_line(error), status=2, is_users=True)
        text = "".join(traceback.format_exception(error)).rstrip()
        summary = f"{type(error).__name__}: {one_line(error)}"
        return Failure(self._rank, Process.this(), summary, text)

    def _failed(self, failure: Failure) -> RankFailedError:
        said = f"{failure.who}{' ' if failure.lost else ': '}{failure.summary}"
        if not failure.is_users:
            said += f"; {self._way_on()}"
        return RankFailedError(f"{said}\n{failure.text}".rstrip(), failure.status)

    def _way_on(self) -> str:
        steps = steps_of(self._output_dir)
        if not steps:
            return "no checkpoint was written"
        return f"go on from {CHECKPOINT}{next(iter(steps))} with --resume, in {self._size} processes"

    def _shows(self) -> bool:
        """Whether it is for this rank to show a failure: rank 0 does, unless it is the one that was lost."""
        failure = self._failure
        if failure is None or failure.rank != 0 or not failure.lost:
            return self._rank == 0
        return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _write_down(self, text: str) -> None:
        """In the run's folder, which is else for rank 0's main thread to do."""
        failure = self._failure
        status = "interrupted" if failure is not None and failure.is_interruption else "failed"
        mark_ended(self._output_dir, status, text.partition("\n")[0], self._began)
        if (self._output_dir / LOG_FILE).is_file():
            with (self._output_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.write(f"{status}: {text}\n")


def _is_of_a_connection(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of the connections between ranks."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
