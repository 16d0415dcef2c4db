"""Whether a run would train on the CPU, as far as the files of devices tell before torch is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError

__all__ = ["check_precision", "surely_on_cpu"]

# NVIDIA (on Linux, under WSL, on Jetson), AMD, Intel and other accelerators
_DEVICES: Final = ("nvidia*", "dxg", "nvhost*", "nvmap", "kfd", "dri/render*", "accel*", "davinci*", "neuron*", "mlu*")


def surely_on_cpu(training: TrainingSection) -> bool:
    """False where a run may find an accelerator, though torch may know none."""
    here = sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in _DEVICES)
    return training.use_cpu or not here


def check_precision(training: TrainingSection) -> None:
    """What a run on the CPU cannot compute in.

    Raises:
        UserError: ``fp16`` or ``tf32``.
    """
    remedies = {"fp16": "set training.bf16, or neither", "tf32": "leave it out"}
    for name, remedy in remedies.items():
        if getattr(training, name, None):
            raise UserError(f"training.{name} needs a GPU, and this run would train on the CPU; {remedy}")
