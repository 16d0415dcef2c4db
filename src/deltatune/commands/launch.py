"""deltatune train --nproc N: the same command in N processes of this machine, one for each GPU.

They meet at a store of torch.distributed that lives here, on a port that the system chose, as they would at torchrun's.
A signal is passed on to the ranks alone: torchrun's goes to all of their processes, those that load data and compile
among them, and kills what has not ended 30 s later, in the middle of a save as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.runs.command import STARTED_BY, command_line
from deltatune.signals import unwatched
from deltatune.training.heartbeat import TOLD

__all__ = ["launch", "run"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_POLL = 0.1
_ENDING = 30.0  # seconds that the others have, once one has failed, to say why and to end
_LEAVING = 5.0  # seconds that they have once rank 0, which speaks for all, has failed, or after a second signal
_TAIL = 4000  # characters of a rank's error output that are shown


def run(args: argparse.Namespace) -> int:
    """Trains in N processes; the status is that of one."""
    _check_devices(args.recipe, args.nproc)
    return launch(_command(args), args.nproc)


def launch(command: list[str], nproc: int) -> int:
    """Runs a command in N processes that find each other as torch.distributed's do; none is left when it returns."""
    with tempfile.TemporaryDirectory(prefix="deltatune-") as folder:
        ranks = _Ranks(command, nproc, Path(folder))
        with unwatched(), ranks.signals_passed_on():
            try:
                ranks.start()
                ranks.wait()
            finally:
                ranks.kill()
        return ranks.status()


def _check_devices(recipe: Recipe, nproc: int) -> None:
    if recipe.training.use_cpu:
        return
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if nproc > there:
        found = "1 GPU is" if there == 1 else f"{there or 'no'} GPUs are"
        raise UserError(
            f"--nproc {nproc}: {found} here; ask for no more than that, or train on the CPU with training.use_cpu: true"
        )


def _command(args: argparse.Namespace) -> list[str]:
    """The command of a rank: this one without --nproc."""
    resume = [] if args.resume is None else ["--resume"] if args.resume is True else [f"--resume={args.resume}"]
    flags = {"--allow-change": args.allow_change, "--debug": args.debug}
    # `python -m deltatune` finds the package from its folder, the installed command does not look there
    safe = [] if sys.path[:1] == [str(Path.cwd())] else ["-P"]
    return [
        *(sys.executable, *safe, "-m", "deltatune", "train", args.file),
        *(f"--set={setting}" for setting in args.overrides),
        *resume,
        *(flag for flag, given in flags.items() if given),
    ]


class _Ranks:
    """The processes of a run: started, waited for, ended."""

    def __init__(self, command: list[str], nproc: int, folder: Path) -> None:
        self._command, self._nproc, self._folder = command, nproc, folder
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._signals: list[int] = []
        self._failed_at: dict[int, float] = {}  # rank -> when it was seen to have failed, in that order
        self._until: float | None = None

    @contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        """Within, a signal goes to the ranks; after the second one they have seconds to end."""
        # a terminal stops this process alone, and its store with it
        ignored = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in [*before.items(), (signal.SIGTSTP, ignored)]:
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: object) -> None:
        self._signals.append(number)
        if len(self._signals) == 2:
            self._until = time.monotonic() + _LEAVING
        for process in self._ranks:
            process.send_signal(number if len(self._signals) < 3 else signal.SIGKILL)

    def start(self) -> None:
        """Starts the ranks, each in a session of its own; what others than rank 0 print is kept."""
        shared = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self._nproc)),
            **os.environ,
            STARTED_BY: command_line(),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(self._nproc),
            "LOCAL_WORLD_SIZE": str(self._nproc),
        }
        for rank in range(self._nproc):
            with self._errors(rank).open("wb") as errors:
                self._ranks.append(
                    subprocess.Popen(
                        self._command,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL if rank else None,
                        stderr=errors if rank else None,
                        start_new_session=True,
                    )
                )
            if self._signals:  # which came before this one was there
                self._ranks[-1].send_signal(self._signals[-1])
                self._until = time.monotonic() + _LEAVING
                break

    def wait(self) -> None:
        """Until all have ended, or those that are left after a failure had their time."""
        while any(process.poll() is None for process in self._ranks):
            now = time.monotonic()
            for rank, process in enumerate(self._ranks):
                if process.poll() and rank not in self._failed_at:
                    self._failed_at[rank] = now
                    # a run that saves after a signal takes its time
                    seconds = _LEAVING if rank == 0 else _ENDING
                    if not self._signals:
                        self._until = min(self._until or now + seconds, now + seconds)
            if self._until is not None and now > self._until:
                return
            time.sleep(_POLL)

    def kill(self) -> None:
        """Ends what is left of ranks that failed, with all that they started."""
        for process in self._ranks:
            if process.poll() != 0:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def status(self) -> int:
        """The exit status, after what no rank has said."""
        statuses = [process.returncode for process in self._ranks]
        if not any(statuses):
            return 0
        if self._signals:
            return statuses[0] if statuses[0] > 0 else 128 + self._signals[0]
        self._say(statuses)
        first = next(iter(self._failed_at), 0)
        return next((status for status in (statuses[0], statuses[first]) if status > 0), 1)

    def _say(self, statuses: list[int]) -> None:
        told = self._store.get(TOLD).decode() if self._store.check([TOLD]) else ""
        if statuses[0] > 0:  # it has spoken
            return
        first = next(iter(self._failed_at), next(rank for rank, status in enumerate(statuses) if status))
        if told:
            sys.stderr.write(f"error: {told}\n")
            return
        ended = statuses[first]
        how = f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"ended with status {ended}"
        sys.stderr.write(f"error: rank {first} (process {self._ranks[first].pid}) {how}\n")
        sys.stderr.write(self._errors(first).read_text(encoding="utf-8", errors="replace")[-_TAIL:])

    def _errors(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"
