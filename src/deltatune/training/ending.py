"""How a run ended: which of its weights are saved, which evaluation is theirs, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.training.trainer import PackedTrainer

__all__ = ["ending", "ending_lines", "evaluation_of_weights"]


def ending(trainer: PackedTrainer) -> dict[str, Any]:
    """The figures of ``metrics.json`` and ``run.json``.

    ``saved_step`` is the step of the weights that are saved; ``best_step``, ``best_eval_loss`` (or the figure of
    ``metric_for_best_model``) and ``best_checkpoint`` are those of the best evaluation, the last None where no
    checkpoint holds its weights; ``stopped_early`` where it was asked for. What was not compared is left out.
    """
    state = trainer.state
    found: dict[str, Any] = {"saved_step": trainer.weights_step}
    if state.best_global_step is not None:
        place = state.best_model_checkpoint if trainer.best_step == state.best_global_step else None
        found |= {
            "best_step": state.best_global_step,
            f"best_{_compared(trainer)}": state.best_metric,
            "best_checkpoint": None if place is None else Path(place).name,
        }
    if trainer.early_stopping is not None:
        found["stopped_early"] = trainer.stopped_early
    return found


def ending_lines(trainer: PackedTrainer) -> list[str]:
    """The same in words."""
    state, found, lines = trainer.state, ending(trainer), []
    if trainer.early_stopping is not None and trainer.stopped_early:
        evaluations = trainer.early_stopping.early_stopping_patience_counter
        lines.append(
            f"stopped early, after step {state.global_step} of {state.max_steps}: the last {evaluations} evaluations "
            "were no better"
        )
    if "best_step" in found:
        where = found["best_checkpoint"] or "no checkpoint holds its weights"
        figure = _compared(trainer)
        value = f"{figure.removeprefix('eval_')} {found[f'best_{figure}']:.4f}"
        lines.append(f"best evaluation: {value} at step {found['best_step']}, {where}")
    if trainer.args.load_best_model_at_end:
        which = f"those of step {found['saved_step']}, the best"
        if trainer.best_step is None:
            which = f"the last (step {found['saved_step']}): no checkpoint of the best is there to return to"
        lines.append(f"the weights that are saved are {which}")
    return lines


def _compared(trainer: PackedTrainer) -> str:
    """The figure by which evaluations are compared, as they log it."""
    return f"eval_{str(trainer.args.metric_for_best_model).removeprefix('eval_')}"


def evaluation_of_weights(trainer: PackedTrainer, *, after: int = -1) -> Mapping[str, Any]:
    """The evaluation of the weights that will be saved, made now if the schedule did not; empty without data for it.

    ``after``: evaluations up to this step count for nothing, as they were of other data.
    """
    if trainer.eval_dataset is None:
        return {}
    figures = (*trainer.figures, trainer.counted)
    for entry in reversed(trainer.state.log_history):
        # of a run that was supervised before and takes preferences now, say, an entry lacks some
        if entry["step"] == trainer.weights_step > after and all(f"eval_{name}" in entry for name in figures):
            return dict(entry)
    return dict(trainer.evaluate())
