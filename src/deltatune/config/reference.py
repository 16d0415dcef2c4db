"""Whether a preference run has the reference that its loss is held against."""

from __future__ import annotations

from collections.abc import Sequence

from deltatune.config.schema import LoraSection, Recipe

__all__ = ["base_is_start", "start_is_reference"]


def base_is_start(lora: LoraSection | None, unfrozen: Sequence[str] | None = None) -> bool:
    """Whether the model without its adapter stays what training began with, in all that the adapter does not add.

    Not where biases or other parameters of the base train, where training goes on from an adapter, or where an
    initialisation moves a part of the base weights into the adapter.
    """
    if lora is None or lora.name_or_path is not None or unfrozen:
        return False
    return lora.bias == "none" and lora.init_lora_weights in (True, False, "gaussian", "eva")


def start_is_reference(recipe: Recipe) -> bool:
    """Whether the reference is the model as it is before the first step, which is computed then."""
    has_reference = recipe.preference is not None and recipe.preference.has_reference
    return has_reference and not base_is_start(recipe.lora, recipe.training.unfrozen_parameters)
