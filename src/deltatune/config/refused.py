"""Every TrainingArguments name that the recipe's section does not spell out: passed on, or refused with the reason.

A refused name has another home in the recipe, which the remedy names, or would do nothing here or harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["MOVED_TRAINING_NAMES", "PASSED_TRAINING_NAMES", "REFUSED_TRAINING_NAMES", "refusal"]

_PASSED: Final = """
accelerator_config dataloader_drop_last dataloader_persistent_workers dataloader_prefetch_factor ddp_backend
ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout eval_delay
eval_on_start full_determinism greater_is_better hub_always_push hub_model_id hub_private_repo
hub_revision hub_strategy include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_strategy
metric_for_best_model optim_args optim_target_modules project push_to_hub save_on_each_node skip_memory_metrics tf32
torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy
"""

PASSED_TRAINING_NAMES: Final = frozenset(_PASSED.split())
"""Names beyond the section's own fields that act as transformers says."""

# remedy, which names the key to use -> the names it is for
_MOVED: Final = {
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
    "use kernels: auto, or a mapping from op to implementation": "use_liger_kernel liger_kernel_config",
    "use deltatune train --resume": "resume_from_checkpoint",
    "use training.warmup_steps: a number below 1 is a share of all steps": "warmup_ratio",
    "use training.eval_strategy": "evaluation_strategy",
    "use training.use_cpu": "no_cuda",
    "use training.bf16 or training.fp16": "mixed_precision",
    "use parallel.shard: the processes that hold one copy of the weights among them, or auto": (
        "deepspeed fsdp fsdp_config parallelism_config"
    ),
    "use training.on_nonfinite: dump, which writes the packs of such a step": "debug",
}

# remedy -> the names it is for
_WITHOUT_HOME: Final = {
    "packs all have the same length, so there is nothing to group": "group_by_length length_column_name",
    "packed data holds exactly what the model takes; leave it out": "remove_unused_columns label_names",
    "the chunked loss has no label smoothing; leave it out": "label_smoothing_factor",
    "its noise depends on the row's length, and a row is a pack; leave it out": "neftune_noise_alpha",
    "training never uses a cache; leave it out": "use_cache",
    "the loss is always divided by the global number of trained tokens": "average_tokens_across_devices",
    "it would wait for the device at every step; leave it out": "logging_nan_inf_filter",
    "the command says what to do; leave it out": "do_train do_eval do_predict",
    "evaluation reports the loss per trained token alone, and keeps no logits; leave it out": (
        "include_for_metrics batch_eval_metrics eval_do_concat_batches prediction_loss_only eval_accumulation_steps "
        "eval_use_gather_object"
    ),
    "it rounds the weights in place, and rounded ones would be saved; leave it out": "bf16_full_eval fp16_full_eval",
    "the recipe is saved with the run; set the HF_TOKEN environment variable instead": "hub_token",
    "the launcher sets it; leave it out": "local_rank",
    "packs come in the order of the seed, from processes that fork; leave it out": (
        "dataloader_in_order dataloader_multiprocessing_context"
    ),
    "SIGTERM always saves a checkpoint and ends the run; leave it out": "enable_jit_checkpoint",
    "a run that goes on does so in its place in the data; leave it out": "ignore_data_skip",
    "nothing that watches a run has a state of its own; leave it out": "restore_callback_states_from_checkpoint",
}

# the one value that is accepted, because it states what is done anyway
_ACCEPTED: Final[Mapping[str, object]] = {
    "label_smoothing_factor": 0,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("average_tokens_across_devices", "prediction_loss_only"), True),
    **dict.fromkeys(("auto_find_batch_size", "group_by_length", "logging_nan_inf_filter"), False),
    **dict.fromkeys(("use_cache", "use_liger_kernel", "bf16_full_eval", "fp16_full_eval"), False),
    **dict.fromkeys(("enable_jit_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"), False),
    "dataloader_in_order": True,
    "eval_use_gather_object": False,
}

REFUSED_TRAINING_NAMES: Final[Mapping[str, tuple[object, str]]] = MappingProxyType(
    {
        name: (_ACCEPTED.get(name), remedy)
        for remedy, names in {**_MOVED, **_WITHOUT_HOME}.items()
        for name in names.split()
    }
)
"""name -> (the accepted value or None, the remedy)."""

MOVED_TRAINING_NAMES: Final = frozenset(name for names in _MOVED.values() for name in names.split())
"""Those of them that have another home, which the remedy names."""


def refusal(name: str, value: object) -> str | None:
    """Why ``training.<name>: <value>`` is refused, or None when it is not.

    >>> refusal("per_device_train_batch_size", 1) is None
    True
    """
    if name not in REFUSED_TRAINING_NAMES:
        return None
    accepted, remedy = REFUSED_TRAINING_NAMES[name]
    return None if accepted is not None and value == accepted else remedy
