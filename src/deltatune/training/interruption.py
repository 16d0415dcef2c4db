"""What Ctrl-C that ends a run at once leaves of it, and how the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from deltatune.runs.command import resuming_command
from deltatune.training.sealed import ORDER, latest, manifest, next_place, size_problem_of
from deltatune.training.trainer import PackedTrainer

__all__ = ["told_what_is_kept"]


@contextmanager
def told_what_is_kept(trainer: PackedTrainer, output_dir: Path, began_from: Path | None) -> Iterator[None]:
    """Says it where Ctrl-C ends the run at once: the second one, or one after the last step.

    Args:
        trainer: of the run.
        output_dir: where it saves checkpoints.
        began_from: the checkpoint that it went on from.

    Raises:
        KeyboardInterrupt: again, with the last whole checkpoint of this run and the command that goes on from it.
    """
    first_own = next_place(output_dir)
    try:
        yield
    except KeyboardInterrupt as error:
        kept = _kept(output_dir, began_from, first_own)
        if kept is None:
            said = f"no whole checkpoint is there to go on from ({_why_none(trainer.args)})"
        else:
            last, command = kept
            said = f"the last whole checkpoint is {last}; go on with {command}"
        raise KeyboardInterrupt(f"interrupted after step {trainer.state.global_step}: {said}") from error


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
