"""The weights of a saved checkpoint, put back into the model that they came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import nn

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, first_line
from deltatune.hf.model import is_sharded
from deltatune.hf.reading import NotInPiecesError
from deltatune.parallel.filling import Piece, spread
from deltatune.parallel.state import SHARDS, Parts
from deltatune.training.checkpoint import describe_checkpoint, load_model
from deltatune.training.unread import Unread, in_turn

__all__ = ["reload_weights"]


def reload_weights(model: nn.Module, folder: Path, parts: Parts = SHARDS) -> None:
    """Puts a saved checkpoint's weights into ``model``, every one of them.

    Goes through ``from_pretrained``, because some families are saved under other names and shapes than their modules
    have (experts one by one, say). Where ranks hold parts of the model, rank 0 reads them a module at a time, and sends
    every rank its part.

    Raises:
        UserError: weights that are missing or of another shape.
    """
    try:
        if is_sharded(model):
            here = dist.get_rank() == 0
            spread(model.state_dict(keep_vars=True), _saved_pieces(folder) if here else None, parts)
        else:
            model.load_state_dict(load_model(ModelSection(name_or_path=str(folder))).state_dict(), strict=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint of this model: {first_line(error)}") from error


def _saved_pieces(folder: Path) -> Iterator[Piece]:
    """A checkpoint's weights by their names in ``state_dict()``, those of one module in memory at a time."""
    section = ModelSection(name_or_path=str(folder))
    try:
        loaded, pieces = describe_checkpoint(section)
    except NotInPiecesError:
        yield from in_turn(load_model(section).state_dict())
        return
    unread = Unread(loaded.model, pieces)
    yield from unread.weights(loaded.model, loaded.model.state_dict(keep_vars=True))
