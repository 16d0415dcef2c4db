"""The ranks that hold a pack together, held against a model's config before any of its code is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.parallel.heads import check_sequence_size, stateless

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["check_sequence"]


def check_sequence(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Checks ``parallel.sequence`` and ``parallel.recurrent`` against the model's layers, from its config alone.

    Raises:
        UserError: a size that the model cannot take, with those that it can; or states of a model that has none.
    """
    size, recurrent = recipe.parallel.sequence, recipe.parallel.recurrent
    if size == "auto":
        if recurrent == "state" and (why := stateless(config)) is not None:
            raise UserError(f"parallel.recurrent: state cannot act: {why}; leave it out")
        return
    try:
        check_sequence_size(config, size, recurrent)
    except UserError as error:
        raise UserError(f"parallel.{error}") from error
