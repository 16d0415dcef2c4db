"""``training:`` of the recipe as transformers.TrainingArguments, with what a packed loop needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import environ
from typing import Final

import torch
from transformers import TrainingArguments, get_scheduler

from deltatune.config.idle import BY_PLATEAU
from deltatune.config.rules import check_training_names
from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError, one_line
from deltatune.training.devices import check_precision
from deltatune.training.names import MUON, check_values

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


_STEPS: Final = 10


def training_arguments(section: TrainingSection, *, nproc: int | None = None) -> TrainingArguments:
    """TrainingArguments from the recipe's names and values; ``nproc`` plans for a process on each of so many GPUs.

    Raises:
        UserError: an unknown name, a value that TrainingArguments refuses, or several visible GPUs in one process.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    check_training_names(section, known)
    check_values(section)
    # every trained parameter takes part in every step: looking for others costs a walk of the graph
    values = {"ddp_find_unused_parameters": False, **section.arguments(), **_FIXED}
    if section.eval_strategy != "no":  # so that the best checkpoint is known
        values.setdefault("metric_for_best_model", "eval_loss")
    if section.optim == MUON:  # which the trainer makes
        values["optim"] = "adamw_torch"
    if "RANK" not in environ:  # one process has none, or is not started yet
        values.pop("ddp_backend", None)
    if section.use_cpu or not torch.accelerator.is_available():
        check_precision(section)
        values["dataloader_pin_memory"] = False
    try:
        arguments = TrainingArguments(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"training: {one_line(error)}") from error
    _check_schedule(arguments)
    if arguments.n_gpu > 1 and nproc is None:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process; start a process for each with "
            f"--nproc {arguments.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def _check_schedule(arguments: TrainingArguments) -> None:
    """Goes through a schedule once for a weight of nothing: its arguments are checked nowhere else before training."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
        for _ in () if arguments.lr_scheduler_type in BY_PLATEAU else range(_STEPS):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(
            f"training.lr_scheduler_kwargs: {arguments.lr_scheduler_kwargs or {}} does not suit "
            f"lr_scheduler_type: {getattr(arguments.lr_scheduler_type, 'value', arguments.lr_scheduler_type)}: "
            f"{one_line(error)}"
        ) from error


def autocast_dtype(arguments: TrainingArguments | TrainingSection) -> torch.dtype | None:
    """The dtype autocast computes in, where a run asks for it."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
