"""What is left of a run that ends at once, by a signal or for lack of memory, and how it goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from deltatune.errors import UserError, first_line
from deltatune.runs.command import resuming_command, starting_again
from deltatune.signals import Interruption, kept_by
from deltatune.training.sealed import ORDER, latest, manifest, next_place, size_problem_of
from deltatune.training.trainer import PackedTrainer

__all__ = ["told_before_training", "told_of_memory", "told_what_is_kept"]

_SMALLER: Final = (
    "lower packing.tokens_per_batch, or set checkpointing: layer, then activation_offloading: true (deltatune plan "
    "estimates them)"
)

# what allocators say beside torch's own of a GPU: of the host, of a driver, and of cuBLAS for its workspace
_FULL: Final = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def told_what_is_kept(trainer: PackedTrainer, output_dir: Path, began_from: Path | None) -> Iterator[None]:
    """Says it where a signal ends the run at once (the second one, or one outside of its steps), or too little memory.

    Args:
        trainer: of the run.
        output_dir: where it saves checkpoints.
        began_from: the checkpoint that it went on from.

    Raises:
        Interruption: again, with the last whole checkpoint of this run and the command that goes on from it; also in
            the place of a KeyboardInterrupt.
        UserError: a device's memory, or the host's, was full; with the same, and what to change.
    """
    first_own = next_place(output_dir)

    def kept() -> str:
        found = _kept(output_dir, began_from, first_own)
        if found is None and not trainer.state.global_step:
            return _nothing_trained()
        if found is None:
            return f"no whole checkpoint is there to go on from ({_why_none(trainer.args)})"
        last, command = found
        return f"the last whole checkpoint is {last}; go on with {command}"

    try:
        with kept_by(kept):
            yield
    except KeyboardInterrupt as error:
        interruption = error if isinstance(error, Interruption) else Interruption(signal.SIGINT)
        interruption.after, interruption.kept = f"after step {trainer.state.global_step}", interruption.kept or kept()
        raise interruption from error.__cause__
    except (RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        where = f"out of memory at step {trainer.state.global_step + 1}: {first_line(error)}"
        raise UserError(f"{where}; {_SMALLER}; {kept()}") from error


def told_before_training(checkpoint: Path | None = None) -> AbstractContextManager[None]:
    """Says what is kept where a signal comes before a run has trained.

    Args:
        checkpoint: what it goes on from, where that is known to be whole.
    """
    return kept_by(lambda: _nothing_trained(checkpoint))


@contextmanager
def told_of_memory() -> Iterator[None]:
    """Says what to change where a model, or its probe, does not fit before the first step.

    Raises:
        UserError: a device's memory, or the host's, was full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_of_memory(error):
            raise
        raise UserError(
            f"out of memory before the first step: {first_line(error)}; see with deltatune plan what the weights take, "
            "set model.dtype: bfloat16 where they are wider, or divide them among more GPUs with parallel.shard"
        ) from error


def _is_of_memory(error: RuntimeError | MemoryError) -> bool:
    of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_memory or any(said in str(error) for said in _FULL)


def _nothing_trained(checkpoint: Path | None = None) -> str:
    whole = "" if checkpoint is None else f", and {checkpoint} is whole"
    return f"this command has trained nothing{whole}; {starting_again()}"


def _kept(output_dir: Path, began_from: Path | None, first_own: int) -> tuple[Path, str] | None:
    """The last whole checkpoint of a run whose own have places from ``first_own`` on, and what goes on from it."""
    try:
        newest = latest(output_dir)
        is_own = newest is not None and manifest(newest).get(ORDER, 0) >= first_own
        if not is_own and began_from is not None and size_problem_of(began_from) is None:
            is_newest = newest is not None and newest.resolve() == began_from.resolve()
            return began_from, resuming_command(None if is_newest else began_from)
    except (OSError, ValueError):  # another rank may be removing one
        return None
    return None if newest is None else (newest, resuming_command())


def _why_none(arguments: TrainingArguments) -> str:
    """The setting by which a run has no whole checkpoint yet."""
    strategy = SaveStrategy(arguments.save_strategy)
    if strategy != SaveStrategy.NO and arguments.save_only_model:
        return "training.save_only_model"
    return "training.save_steps" if strategy == SaveStrategy.STEPS else f"training.save_strategy: {strategy.value}"
