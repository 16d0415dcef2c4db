"""Systems that train in turn: a few steps each, again and again, on batches that no two steps share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise

import torch

from deltatune.bench.protocol import Timing, between_ms, mark, synchronize
from deltatune.bench.systems import System
from deltatune.bench.workload import Batch, Workload

__all__ = ["Laps", "failures", "first_step", "host_sync", "outcome_of", "race"]


@dataclass
class Laps:
    """What one system gave.

    Attributes:
        samples_ms: of its timed steps.
        peak_bytes: the most that one of its turns allocated beyond what was there at its start; 0 on the CPU.
        failure: ``(status, reason)`` of a system that did not finish.
    """

    samples_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: tuple[str, str] | None = None

    @property
    def timing(self) -> Timing:
        """Of the samples."""
        return Timing.of(self.samples_ms)


def race(
    systems: Mapping[str, System],
    workload: Workload,
    laps: dict[str, Laps] | None = None,
    *,
    warmup: int = 3,
    steps: int = 12,
    rounds: int = 4,
) -> dict[str, Laps]:
    """Times training steps, a turn of each system in every round.

    A turn is one step that is not timed and ``steps / rounds`` that are, one after the other as in training: a sample
    is the time between the ends of two steps, so what the host cannot hide counts. A batch is collated before the turn
    and copied to the device within its step. Memory that a turn leaves unused is given back before the next one's.

    Args:
        systems: by name.
        workload: of the batches; number 0 is left to others.
        laps: filled as it goes, and returned: what a caller that is interrupted still has.
        warmup: steps of each system before the first round, its first step among them where it has not run yet.
        steps: samples of each system.
        rounds: turns of each.
    """
    numbers = workload.batches()
    laps = {} if laps is None else laps
    laps |= {name: Laps() for name in systems}
    for name, system in systems.items():
        _guarded(laps[name], system, functools.partial(_train, system, islice(numbers, warmup)))
    per_turn = -(-steps // rounds)
    for _ in range(rounds):
        for name, system in systems.items():
            if laps[name].failure is None:
                _guarded(laps[name], system, functools.partial(_turn, system, numbers, per_turn, laps[name]))
    return laps


def first_step(system: System, workload: Workload) -> None:
    """The step that compiles, waited for; ``System.first_step_seconds`` holds how long it took since ``prepare``."""
    system.first_step(workload.batch(0))


def host_sync(system: System, workload: Workload) -> str | None:
    """Whether a step makes the host wait for the device once its batch is there: what did, or None.

    Forward, loss, backward and optimizer of one step run with torch set to raise at a synchronising call. On the CPU
    there is nothing to wait for.
    """
    if system.device.type != "cuda":
        return None
    batch = workload.batch(0).to(system.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        system.step(batch)
    except RuntimeError as error:
        return " ".join(str(error).split())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        system.optimizer.zero_grad(set_to_none=True)
    return None


def failures() -> tuple[type[Exception], ...]:
    """What a system may fail with and leave the others their figures; an interrupt is none of them."""
    known = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def outcome_of(error: Exception) -> tuple[str, str]:
    """``(status, reason)`` of a record's result."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out_of_memory", str(error).splitlines()[0]
    if isinstance(error, ValueError):
        return "unavailable", " ".join(str(error).split())[:500]
    return "failed", " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _guarded(laps: Laps, system: System, run: Callable[[], None]) -> None:
    """Runs out of memory or into a limit of a library without losing what others gave."""
    try:
        run()
    except failures() as error:
        laps.failure = outcome_of(error)
    finally:
        system.optimizer.zero_grad(set_to_none=True)
        if system.device.type == "cuda":
            torch.cuda.empty_cache()


def _train(system: System, batches: Iterator[Batch]) -> None:
    for batch in batches:
        if system.first_step_seconds is None:
            system.first_step(batch)
        else:
            system.step(batch)
    synchronize(system.device)


def _turn(system: System, numbers: Iterator[Batch], count: int, laps: Laps) -> None:
    batches = list(islice(numbers, count + 1))
    cuda = system.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for batch in batches:
        system.step(batch)
        marks.append(mark(system.device))
    synchronize(system.device)
    laps.samples_ms += [between_ms(*pair) for pair in pairwise(marks)]
    if cuda:
        laps.peak_bytes = max(laps.peak_bytes, torch.cuda.max_memory_allocated() - before)
