"""Room on the disk: what a run will save, held against what is free where it goes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from deltatune.compile.memory import optimizer_bytes
from deltatune.config.schema import Recipe
from deltatune.errors import UserError, user_path
from deltatune.training.preflight import existing_parent

__all__ = ["Room", "check_space"]


@dataclass(frozen=True)
class Room:
    """Bytes that a run saves, and those that are free.

    Attributes:
        model_bytes: of the adapter, or of the whole model.
        checkpoint_bytes: of a checkpoint: the model and the optimizer's state. 0 where none is saved.
        at_once: checkpoints that are there at the same time under ``save_total_limit``: the newest is written before
            the oldest goes. None where there is no limit.
        free_bytes: of the file system.
        folder: which one.
    """

    model_bytes: int
    checkpoint_bytes: int
    at_once: int | None
    free_bytes: int
    folder: Path

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> Room:
        """Of a model as the recipe trains it, weights or none: shapes decide. Tokenizer and records are not counted."""
        training = recipe.training
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        saved = sum(map(_bytes, model.parameters() if recipe.lora is None else trained))
        state = 0 if training.save_only_model else sum(optimizer_bytes(weight, training.optim) for weight in trained)
        limit = training.save_total_limit
        folder = existing_parent(user_path(training.output_dir))
        return cls(
            model_bytes=saved,
            checkpoint_bytes=0 if training.save_strategy == "no" else saved + state,
            at_once=None if limit is None else limit + 1,
            free_bytes=shutil.disk_usage(folder).free,
            folder=folder,
        )

    def lines(self) -> list[str]:
        """For people."""
        if not self.checkpoint_bytes:
            return [f"saves {_size(self.model_bytes)}; {self.folder} has {_size(self.free_bytes)} free"]
        several = "" if self.at_once is None else f", {self.at_once} of them at once"
        return [
            f"a checkpoint is {_size(self.checkpoint_bytes)}{several}; {self.folder} has {_size(self.free_bytes)} free"
        ]

    def warnings(self) -> list[str]:
        """That not all of the checkpoints that are kept will fit."""
        needed = (self.at_once or 0) * self.checkpoint_bytes
        if needed <= self.free_bytes:
            return []
        return [
            f"training.save_total_limit: {self.at_once} checkpoints at once, one of them being written, need "
            f"{_size(needed)}, and {self.folder} has {_size(self.free_bytes)} free; lower it, or make room"
        ]


def check_space(model: nn.Module, recipe: Recipe) -> Room:
    """Room for what the recipe saves of this model.

    Raises:
        UserError: the first save does not fit.
    """
    room = Room.of(model, recipe)
    needed = max(room.model_bytes, room.checkpoint_bytes)
    if needed > room.free_bytes:
        smaller = "" if recipe.lora is None else ", or lower the ranks of adapters (lora.r, lora.rank_pattern)"
        raise UserError(
            f"training.output_dir: the first save needs {_size(needed)}, and {room.folder} has "
            f"{_size(room.free_bytes)} free; make room, choose a folder on another disk{smaller}"
        )
    return room


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(count: int) -> str:
    """
    >>> _size(3 * 2**29)
    '1.5 GiB'
    """
    number, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, _ = number / 1024, units.pop(0)
    return f"{number:.0f} {units[0]}" if units[0] == "bytes" else f"{number:.1f} {units[0]}"
