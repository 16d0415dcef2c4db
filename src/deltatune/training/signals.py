"""SIGTERM and Ctrl-C while a run trains: the first ends it after the step with a checkpoint, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StopAfterStep", "caught_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which a signal came, with a checkpoint.

    Attributes:
        received: the signal, once it came.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end, if a signal came."""
        del args, state, kwargs
        if self.received is not None:
            control.should_save = control.should_training_stop = True


@contextmanager
def caught_signals(stop: StopAfterStep, say: Callable[[str], None]) -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT is noted in ``stop``; a second one acts as if nothing caught it.

    Outside the main thread, where Python takes no handlers, signals act as ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        stop.received = number
        restore()
        name = signal.Signals(number).name
        say(f"{name}: the run ends after this step, with a checkpoint; once more ends it at once")

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
