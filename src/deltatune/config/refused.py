"""TrainingArguments names that cannot act here, each with the key to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["REFUSED_TRAINING_NAMES", "refusal"]

# remedy -> the names it is for
_REMEDIES: Final = {
    "use checkpointing: none, layer, auto, or a number from 0 to 1": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs"
    ),
    "use compile: true, or a section with scope, strict and options": (
        "torch_compile torch_compile_backend torch_compile_mode"
    ),
    "use compile.options": "torch_compile_options",
    "a batch is one pack; use packing.tokens_per_batch (and training.gradient_accumulation_steps)": (
        "per_device_train_batch_size per_device_eval_batch_size auto_find_batch_size max_length max_seq_length packing "
        "padding_free"
    ),
    "packs all have the same length, so there is nothing to group": "group_by_length length_column_name",
    "packed data holds exactly what the model takes; leave it out": "remove_unused_columns",
    "the chunked loss has no label smoothing; leave it out": "label_smoothing_factor",
    "its noise depends on the row's length, and a row is a pack; leave it out": "neftune_noise_alpha",
    "use kernels: auto, or a mapping from op to implementation": "use_liger_kernel liger_kernel_config",
    "training never uses a cache; leave it out": "use_cache",
    "the loss is always divided by the global number of trained tokens": "average_tokens_across_devices",
    "it would wait for the device at every step; leave it out": "logging_nan_inf_filter",
    "use deltatune train --resume": "resume_from_checkpoint",
    "the command says what to do; leave it out": "do_train do_eval do_predict",
    "evaluation reports the loss per trained token alone; leave it out": (
        "include_for_metrics batch_eval_metrics eval_do_concat_batches prediction_loss_only"
    ),
    "the recipe is saved with the run; set the HF_TOKEN environment variable instead": "hub_token",
    "the launcher sets it; leave it out": "local_rank",
    "use training.warmup_steps: a number below 1 is a share of all steps": "warmup_ratio",
    "use training.eval_strategy": "evaluation_strategy",
    "use training.use_cpu": "no_cuda",
    "use training.bf16 or training.fp16": "mixed_precision",
}

# the one value that is accepted, because it states what is done anyway
_ACCEPTED: Final[Mapping[str, object]] = {
    "label_smoothing_factor": 0,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("average_tokens_across_devices", "prediction_loss_only"), True),
    **dict.fromkeys(("auto_find_batch_size", "group_by_length", "logging_nan_inf_filter"), False),
    **dict.fromkeys(("use_cache", "use_liger_kernel"), False),
}

REFUSED_TRAINING_NAMES: Final[Mapping[str, tuple[object, str]]] = MappingProxyType(
    {name: (_ACCEPTED.get(name), remedy) for remedy, names in _REMEDIES.items() for name in names.split()}
)
"""name -> (the accepted value or None, the remedy)."""


def refusal(name: str, value: object) -> str | None:
    """Why ``training.<name>: <value>`` is refused, or None when it is not.

    >>> refusal("per_device_train_batch_size", 1) is None
    True
    """
    if name not in REFUSED_TRAINING_NAMES:
        return None
    accepted, remedy = REFUSED_TRAINING_NAMES[name]
    return None if accepted is not None and value == accepted else remedy
