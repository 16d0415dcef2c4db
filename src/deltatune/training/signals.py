"""SIGTERM and Ctrl-C while a run trains: the first ends it after the step with a checkpoint, the second at once.

A launcher passes signals on to its processes one by one, and they lie between different steps of the host. So all ranks
agree after every step, by a number that goes over gloo and makes no device wait.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.signals import noted

__all__ = ["StopAfterStep", "caught_signals"]


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which a signal came to any rank, with a checkpoint.

    Args:
        began: called before the first step, with the checkpoint that a run goes on from restored.

    Attributes:
        received: the signal, once it came; of all ranks the largest, once they agreed.
    """

    def __init__(self, began: Callable[[], object] = lambda: None) -> None:
        self._began = began
        self.received: int | None = None
        self._stops = False
        self._ranks: dist.ProcessGroup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the way by which ranks agree, and tells that steps begin."""
        del state, control, kwargs
        if args.world_size > 1:
            self._ranks = dist.new_group(backend="gloo")
        self._began()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end, if a signal came."""
        del state, kwargs
        agreed = self.received
        if self._ranks is not None:
            largest = torch.tensor(agreed or 0)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._ranks)
            agreed = int(largest) or None
        if agreed is not None:  # one that came meanwhile ends the next step
            self.received, self._stops = agreed, True
            control.should_save = control.should_training_stop = True
            args.save_only_model = False  # nothing goes on from a model alone

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves out what is due at the end of an epoch, where the end of training is taken for it.

        Such an evaluation would cost the time that is left, and patience and the best checkpoint would count it, which
        a run that nothing stops never makes.
        """
        del args, kwargs
        if not self._stops or state.global_step >= state.max_steps:
            return
        if state.epoch % 1:
            control.should_evaluate = control.should_save = False
        elif control.should_evaluate:
            control.should_save = True  # the checkpoint of this step is from before it

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes it."""
        if self._ranks is not None:
            dist.destroy_process_group(self._ranks)
            self._ranks = None


def caught_signals(stop: StopAfterStep, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Within, the first SIGTERM or SIGINT is noted in ``stop``; a second one acts as if nothing caught it.

    Outside the main thread, where Python takes no handlers, signals act as ever.
    """

    def note(number: int) -> None:
        stop.received = number
        name = signal.Signals(number).name
        say(f"{name}: the run ends after this step, with a checkpoint; once more ends it at once")

    return noted(note)
