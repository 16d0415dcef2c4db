"""Generation settings of published models, which are saved as they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import GenerationConfig

__all__ = ["PublishedSettings", "keep_settings"]


class PublishedSettings(GenerationConfig):  # type: ignore[misc]
    """A ``GenerationConfig`` that names what has no effect, a temperature without sampling say, and can be saved again.

    transformers 5.17 refuses to save such a one, later versions do once a token's id has been aligned with the
    tokenizer's: a run would end at its first checkpoint.
    """

    def validate(self, strict: bool = False, **options: Any) -> None:
        """As transformers, which warns."""
        del strict
        super().validate(strict=False, **options)


def keep_settings(model: nn.Module) -> None:
    """Lets a loaded model's generation settings be saved as they were published."""
    settings: Any = getattr(model, "generation_config", None)
    if type(settings) is GenerationConfig:
        settings.__class__ = PublishedSettings
