"""The weights of a saved checkpoint, put back into the model that they came from."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import nn

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, first_line
from deltatune.hf.model import is_sharded
from deltatune.parallel.filling import spread
from deltatune.training.checkpoint import load_model

__all__ = ["reload_weights"]


def reload_weights(model: nn.Module, folder: Path) -> None:
    """Puts a saved checkpoint's weights into ``model``, every one of them.

    Goes through ``from_pretrained``, because some families are saved under other names and shapes than their modules
    have (experts one by one, say); where the model is sharded, on rank 0, which sends every rank its part.

    Raises:
        UserError: weights that are missing or of another shape.
    """
    sharded = is_sharded(model)
    here = not sharded or dist.get_rank() == 0
    saved = load_model(ModelSection(name_or_path=str(folder))).state_dict() if here else {}
    try:
        if sharded:
            spread(model.state_dict(keep_vars=True), saved)
        else:
            model.load_state_dict(saved, strict=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint of this model: {first_line(error)}") from error
