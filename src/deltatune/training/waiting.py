"""How long the ranks of a run wait for the slowest: from the forward passes of each, which no collective holds up.

A step ends for all when its slowest rank is done. Forward and backward grow alike with a rank's packs, but the backward
pass also waits for gradients of others, so the forward passes alone are timed: on a GPU by events, which nobody waits
for before a log line. A forward pass with collectives in it (weights that are gathered, a pack that ranks exchange,
experts on several ranks) counts waiting for the others as its own time, and the share is a lower bound.
"""

# S steps, R ranks

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import torch

__all__ = ["ForwardTimes", "waiting_share"]

_MOST: Final = 1000  # steps that are kept where no log line asks

_Mark: TypeAlias = "float | torch.Event"


class ForwardTimes:
    """The seconds of each step's forward passes on this rank."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._step: list[tuple[_Mark, _Mark]] = []
        self._steps: list[list[tuple[_Mark, _Mark]]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times a forward pass."""
        begin = self._mark()
        yield
        self._step.append((begin, self._mark()))

    def end_step(self) -> None:
        """The passes since the last call were those of one step."""
        self._steps.append(self._step)
        self._step = []
        del self._steps[:-_MOST]

    def clear(self) -> None:
        """Forgets all of them."""
        self._step, self._steps = [], []

    def take(self) -> list[float]:
        """The seconds of each step since the last call, [S]; the device has been waited for."""
        steps, self._steps = self._steps, []
        return [sum(_seconds(*marks) for marks in step) for step in steps]

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        return event


def waiting_share(seconds: Sequence[Sequence[float]]) -> float | None:
    """``1 - sum(mean over ranks) / sum(max over ranks)`` over the steps of [R, S]; None where nothing was timed.

    >>> waiting_share([[1.0, 3.0], [1.0, 1.0]])
    0.25
    """
    steps = list(zip(*seconds, strict=True))
    slowest = sum(max(step) for step in steps)
    if slowest <= 0:
        return None
    mean = sum(sum(step) / len(step) for step in steps)
    return float(1 - mean / slowest)


def _seconds(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
