"""``training:`` of the recipe as transformers.TrainingArguments, with what a packed loop needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import torch
from transformers import TrainingArguments

from deltatune.config.rules import check_training_names
from deltatune.config.schema import TrainingSection
from deltatune.errors import UserError

__all__ = ["autocast_dtype", "training_arguments"]

# What the packed loop depends on; the recipe's rules refuse other values, each with its reason. A name that the
# installed transformers does not have is left out.
_FIXED: Final[Mapping[str, object]] = {
    "average_tokens_across_devices": True,
    "logging_nan_inf_filter": False,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "prediction_loss_only": True,
    "remove_unused_columns": False,
}


def training_arguments(section: TrainingSection) -> TrainingArguments:
    """TrainingArguments from the recipe's names and values.

    Raises:
        UserError: an unknown name, a value that TrainingArguments refuses, or several visible GPUs in one process.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    check_training_names(section, known)
    # every trained parameter takes part in every step: looking for others costs a walk of the graph
    values = {"ddp_find_unused_parameters": False, **section.arguments(), **_FIXED}
    if values.get("use_cpu") or not torch.accelerator.is_available():
        values["dataloader_pin_memory"] = False
    try:
        arguments = TrainingArguments(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process; start a process for each with "
            f"torchrun --nproc-per-node {arguments.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def autocast_dtype(arguments: TrainingArguments | TrainingSection) -> torch.dtype | None:
    """The dtype autocast computes in, where a run asks for it."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
