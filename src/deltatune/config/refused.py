"""TrainingArguments names that cannot act here, each with the key to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["REFUSED_TRAINING_NAMES", "refusal"]

_CHECKPOINTING = "use checkpointing: none, layer, auto, or a number from 0 to 1"
_COMPILE = "use compile: true, or a section with scope, strict and options"
_PACKS = "a batch is one pack; use packing.tokens_per_batch (and training.gradient_accumulation_steps)"
_SAME_LENGTH = "packs all have the same length, so there is nothing to group"
_NO_METRICS = "evaluation reports the loss per trained token alone; leave it out"
_COMMANDS = "the command says what to do; leave it out"
_KERNELS = "use kernels: auto, or a mapping from op to implementation"
_PRECISION = "use training.bf16 or training.fp16"

# name -> (the one value that is accepted because it states what is done anyway, or None; the remedy)
REFUSED_TRAINING_NAMES: Final[Mapping[str, tuple[object, str]]] = MappingProxyType(
    {
        "activation_checkpointing": (None, _CHECKPOINTING),
        "activation_checkpointing_kwargs": (None, _CHECKPOINTING),
        "gradient_checkpointing": (None, _CHECKPOINTING),
        "gradient_checkpointing_kwargs": (None, _CHECKPOINTING),
        "torch_compile": (None, _COMPILE),
        "torch_compile_backend": (None, _COMPILE),
        "torch_compile_mode": (None, _COMPILE),
        "torch_compile_options": (None, "use compile.options"),
        "per_device_train_batch_size": (1, _PACKS),
        "per_device_eval_batch_size": (1, _PACKS),
        "auto_find_batch_size": (False, _PACKS),
        "max_length": (None, _PACKS),
        "max_seq_length": (None, _PACKS),
        "packing": (None, _PACKS),
        "padding_free": (None, _PACKS),
        "group_by_length": (False, _SAME_LENGTH),
        "length_column_name": (None, _SAME_LENGTH),
        "remove_unused_columns": (None, "packed data holds exactly what the model takes; leave it out"),
        "label_smoothing_factor": (0, "the chunked loss has no label smoothing; leave it out"),
        "neftune_noise_alpha": (None, "its noise depends on the row's length, and a row is a pack; leave it out"),
        "use_liger_kernel": (False, _KERNELS),
        "liger_kernel_config": (None, _KERNELS),
        "use_cache": (False, "training never uses a cache; leave it out"),
        "average_tokens_across_devices": (True, "the loss is always divided by the global number of trained tokens"),
        "logging_nan_inf_filter": (False, "it would wait for the device at every step; leave it out"),
        "resume_from_checkpoint": (None, "use deltatune train --resume"),
        "do_train": (None, _COMMANDS),
        "do_eval": (None, _COMMANDS),
        "do_predict": (None, _COMMANDS),
        "include_for_metrics": (None, _NO_METRICS),
        "batch_eval_metrics": (None, _NO_METRICS),
        "eval_do_concat_batches": (None, _NO_METRICS),
        "prediction_loss_only": (True, _NO_METRICS),
        "hub_token": (None, "the recipe is saved with the run; set the HF_TOKEN environment variable instead"),
        "local_rank": (None, "the launcher sets it; leave it out"),
        "warmup_ratio": (None, "use training.warmup_steps: a number below 1 is a share of all steps"),
        "evaluation_strategy": (None, "use training.eval_strategy"),
        "no_cuda": (None, "use training.use_cpu"),
        "mixed_precision": (None, _PRECISION),
    }
)


def refusal(name: str, value: object) -> str | None:
    """Why ``training.<name>: <value>`` is refused, or None when it is not.

    >>> refusal("per_device_train_batch_size", 1) is None
    True
    """
    if name == "train_sampling_strategy" and value == "group_by_length":
        return _SAME_LENGTH
    if name not in REFUSED_TRAINING_NAMES:
        return None
    accepted, remedy = REFUSED_TRAINING_NAMES[name]
    return None if accepted is not None and value == accepted else remedy
