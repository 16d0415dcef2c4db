"""When a run evaluates and saves, and what needs that: the values that TrainingArguments would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from deltatune.config.idle import BY_PLATEAU
from deltatune.config.schema import Recipe
from deltatune.config.training_section import TrainingSection

__all__ = ["moment_errors"]


def moment_errors(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the moments of evaluations and checkpoints, one line each."""
    training, extra = recipe.training, recipe.training.model_extra or {}
    if training.lr_scheduler_type in BY_PLATEAU and training.eval_strategy == "no":
        yield (
            f"training.lr_scheduler_type: {training.lr_scheduler_type} follows evaluations; set data.eval and "
            "training.eval_strategy"
        )
    # without evaluations at all there is nothing to agree with
    if training.load_best_model_at_end and training.eval_strategy != "no" and training.save_strategy != "best":
        yield from _best_errors(training)
    for name in ("torch_empty_cache_steps", "dataloader_prefetch_factor"):
        count = extra.get(name)
        if count is not None and not (isinstance(count, int) and count > 0):
            yield f"training.{name} must be a whole number above 0; got {count}"


def _best_errors(training: TrainingSection) -> Iterator[str]:
    """The best model is that of a checkpoint, so every checkpoint needs an evaluation."""
    if training.eval_strategy != training.save_strategy:
        yield (
            f"training.load_best_model_at_end with save_strategy: {training.save_strategy} and eval_strategy: "
            f"{training.eval_strategy}: set both to the same, or save_strategy to best"
        )
    elif training.eval_strategy == "steps":
        saves, evaluates = training.save_steps, training.eval_steps or training.logging_steps
        if (saves < 1) != (evaluates < 1) or Fraction(str(saves)) % Fraction(str(evaluates)):
            yield (
                f"training.load_best_model_at_end with save_steps: {saves} and eval_steps: {evaluates}: set save_steps "
                "to a multiple of eval_steps, or save_strategy to best"
            )
