"""A run that ends when its evaluations get no better, and knows how many did not after a resume."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerState

from deltatune.config.training_section import TrainingSection

__all__ = ["EarlyStopping"]


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' own, whose count of evaluations goes on from a checkpoint under the patience that holds now.

    (The Trainer would restore both, or neither.)
    """

    @classmethod
    def of(cls, section: TrainingSection) -> EarlyStopping | None:
        """What a recipe asks for; None where it does not."""
        if section.early_stopping_patience is None:
            return None
        return cls(section.early_stopping_patience, section.early_stopping_threshold)

    @property
    def stops(self) -> bool:
        """Whether as many evaluations as the patience allows were no better than one before."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def restore(self, state: TrainerState) -> None:
        """Takes up the count that a checkpoint's state holds; one saved without early stopping holds none."""
        saved: Any = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved.get("attributes", {}).items():
            setattr(self, name, value)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on counting."""
        del args, control, kwargs
        self.restore(state)
