"""Signs of life of the ranks, through the store at which they met.

Every rank counts up a number of its own about once a second, from a thread, over a connection of its own: collectives
and the store's other users do not wait for it. Rank 0 looks at all numbers, the others at rank 0's. Clocks are not
compared: a rank is heard of when its number has changed. The store also carries the first failure of any rank to all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from deltatune.errors import one_line
from deltatune.training.processes import Process

__all__ = ["BEAT", "TOLD", "Failure", "Heartbeat", "connect", "launcher_hosts"]

BEAT = 1.0
"""Seconds between signs of life."""

TOLD = "deltatune/told"
"""The key of the store that holds what was shown of a failure."""


@dataclass(frozen=True)
class Failure:
    """Why a run of several ranks ends: of all that was reported, what came first."""

    rank: int | None  # None: their launcher
    process: Process | None
    summary: str  # one line
    text: str = ""  # the traceback, where there is one
    status: int = 1  # of the commands
    lost: bool = False  # it did not say so itself
    is_users: bool = False  # the user's input is at fault

    @property
    def is_interruption(self) -> bool:
        """Whether a signal has ended the rank."""
        return self.status > 128

    @property
    def who(self) -> str:
        """The rank and where it ran."""
        name = "the launcher" if self.rank is None else f"rank {self.rank}"
        return name if self.process is None else f"{name} on {self.process}"

    def dump(self) -> str:
        """JSON, for the store."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: bytes) -> Failure:
        """The inverse of ``dump``."""
        fields = json.loads(text)
        return cls(**{**fields, "process": _process(fields["process"])})


def _process(fields: dict[str, Any] | None) -> Process | None:
    return None if fields is None else Process(**fields)


def launcher_hosts() -> bool:
    """Whether the store lives in the launcher, as with torchrun; else it does in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout_s: float) -> TCPStore:
    """A connection of its own to the store at ``MASTER_ADDR`` and ``MASTER_PORT``."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class Heartbeat(threading.Thread):
    """Writes the signs of life of this rank and reads those of others, until it is stopped or the store is gone.

    No caller ever waits for the store: what is to be written is left here for the next turn.

    Args:
        store: a connection that nobody else uses.
        rank, size: of this process, of all.

    Attributes:
        processes: of the ranks that were heard of.
        heard: when each of the watched ranks was last heard of, by this process's monotonic clock.
        answered: when the store had last answered everything.
        broken: what the store's connection said when it broke.
        failure: the first that was reported.
        is_told: set once a failure was shown.
        all_ended: set once every rank has ended well.
    """

    def __init__(self, store: TCPStore, rank: int, size: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._host, self._rank, self._size = store, rank, size
        now = time.monotonic()
        watched = range(1, size) if rank == 0 else range(1)
        self._counts, self.heard = dict.fromkeys(watched, 0), dict.fromkeys(watched, now)
        self.processes: dict[int, Process] = {}
        self.answered, self.broken = now, ""
        self.failure: Failure | None = None
        self.is_told, self.all_ended = threading.Event(), threading.Event()
        self._turned, self._wake, self._stopping = threading.Condition(), threading.Event(), threading.Event()
        self._turns = 0
        self._outgoing: Failure | None = None
        self._said: str | None = None
        self._ended = self._counted = False

    def report(self, failure: Failure) -> None:
        """Tells all ranks of a failure; the first one counts."""
        self._outgoing = failure
        self._wake.set()

    def tell(self, text: str) -> None:
        """Tells all ranks that a failure was shown, and the launcher what was."""
        self._said = text
        self._wake.set()

    def end(self) -> None:
        """This rank has ended well; ``all_ended`` is set when all have."""
        self._ended = True
        self._wake.set()

    @property
    def ended_with_store(self) -> bool:
        """Whether the store broke after this rank had ended: it has then gone with rank 0, which had heard of all."""
        return self._ended and bool(self.broken)

    def stop(self) -> None:
        """Ends the thread, if the store lets it."""
        self._stopping.set()
        self._wake.set()
        self.join(2 * BEAT)

    def excuse(self, seconds: float) -> None:
        """Nothing could be heard for some seconds: this process itself was stopped."""
        self.answered += seconds
        self.heard = {rank: at + seconds for rank, at in self.heard.items()}

    def wait_for_turn(self, timeout: float) -> None:
        """Waits until what was asked of the store before is done, or the store is gone, but not for ever."""
        end = time.monotonic() + timeout
        for _ in range(2):  # one may be under way
            self._wait_for_another(max(0.0, end - time.monotonic()))

    def _wait_for_another(self, timeout: float) -> None:
        with self._turned:
            turns = self._turns
            self._wake.set()
            self._turned.wait_for(lambda: self.broken or self._turns > turns, timeout)

    def run(self) -> None:
        """The thread."""
        try:
            # by how often this rank has begun here: a restarted run, or a second one, hears nothing of the first
            begun = self._host.add(f"deltatune/begun/{self._rank}", 1)
            store = PrefixStore(f"deltatune/{begun}", self._host)
            store.set(f"process/{self._rank}", json.dumps(dataclasses.asdict(Process.this())))
            while not self._stopping.is_set():
                self._wake.clear()
                self._turn(store)
                with self._turned:
                    self.answered, self._turns = time.monotonic(), self._turns + 1
                    self._turned.notify_all()
                self._wake.wait(BEAT)
        except RuntimeError as error:  # all of torch.distributed's are
            with self._turned:
                self.broken = one_line(error)
                self._turned.notify_all()

    def _turn(self, store: Store) -> None:
        store.add(f"beat/{self._rank}", 1)
        for rank, before in self._counts.items():
            self._hear(store, rank, before)
        if self._outgoing is not None:
            # what is there already stays
            store.compare_set("failure", "", self._outgoing.dump())
            self._outgoing = None
        if self.failure is None and store.check(["failure"]):
            self.failure = Failure.load(store.get("failure"))
        if self._said is not None:
            self._host.set(TOLD, self._said)
            store.set("told", "1")
            self._said = None
        if store.check(["told"]):
            self.is_told.set()
        self._take_leave(store)

    def _hear(self, store: Store, rank: int, before: int) -> None:
        count = store.add(f"beat/{rank}", 0)  # which waits for nobody, as reading would
        if count == before:
            return
        self._counts[rank], self.heard[rank] = count, time.monotonic()
        if rank not in self.processes:
            self.processes[rank] = Process(**json.loads(store.get(f"process/{rank}")))

    def _take_leave(self, store: Store) -> None:
        if not self._ended:
            return
        if not self._counted:
            store.add("ended", 1)
            self._counted = True
        if store.add("ended", 0) >= self._size:
            self.all_ended.set()
