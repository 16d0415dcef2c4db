"""Names of transformers.TrainingArguments, which three of the formats share."""

from __future__ import annotations

from typing import Any

from deltatune.importing.groups import muon
from deltatune.importing.rules import Outcome, Rule, Settings, alone, carried, changed, idle, other, refused
from deltatune.importing.values import count, flag, is_off, mapping, number, steps, text, texts, whole

__all__ = [
    "AXES",
    "BITS_8",
    "SHARDING",
    "TRAINING_ARGUMENTS",
    "checkpointing",
    "epochs",
    "learning_rate_schedule",
    "offloading",
    "optimizer",
    "warmup_ratio",
]

BITS_8 = "needs bitsandbytes (pip install 'deltatune[optimizers]')"
SHARDING = "weights are sharded by parallel.shard, which is auto unless it is set; start the processes with torchrun"
AXES = "the section parallel says how several processes divide packs, weights and the tokens of a pack"
PACKED = "packs are always used; documents stay apart in them"

# transformers' names; what is beside them is needed beyond the train extra
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"), ""),
    **dict.fromkeys(
        [
            "adamw_bnb_8bit",
            "adamw_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_8bit",
            "paged_lion_32bit",
            "ademamix",
            "ademamix_8bit",
            "paged_ademamix_8bit",
            "paged_ademamix_32bit",
            "rmsprop_bnb",
            "rmsprop_bnb_8bit",
            "rmsprop_bnb_32bit",
        ],
        BITS_8,
    ),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "needs torchao (pip install 'deltatune[optimizers]')"),
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
        "needs schedulefree (pip install schedulefree)",
    ),
}
# another name, or one that transformers no longer has
_RENAMED = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@alone
def optimizer(value: Any) -> Outcome:
    """An optimizer by transformers' name."""
    if value is None:
        return Outcome("no effect here", why="not set")
    name = text(value)
    if name in _RENAMED:
        return Outcome("changed", {"training.optim": _RENAMED[name]}, "transformers' name for it today")
    if name == "muon":
        return muon(name, {})
    if name not in _OPTIMIZERS:
        return Outcome("not supported", why="no optimizer of transformers that is known to work here")
    return Outcome("carried", {"training.optim": name}, _OPTIMIZERS[name])


@alone
def learning_rate_schedule(value: Any) -> Outcome:
    """A learning-rate schedule by transformers' name."""
    if value is None:
        return Outcome("no effect here", why="not set")
    if text(value) not in _SCHEDULES:
        return Outcome("not supported", why="no schedule of transformers; set training.lr_scheduler_type")
    return Outcome("carried", {"training.lr_scheduler_type": value})


def warmup_ratio(value: Any, settings: Settings) -> Outcome:
    """A share of all steps, unless the number of steps is given as well, which wins."""
    if is_off(value):
        return Outcome("no effect here", why="no warm-up is the default here")
    if not is_off(settings.get("warmup_steps")):
        return Outcome("no effect here", why="warmup_steps is given, which wins")
    return Outcome("changed", {"training.warmup_steps": number(value)}, "a number below 1 is a share of all steps")


def epochs(value: Any, settings: Settings) -> Outcome:
    """Passes over the data, unless max_steps ends the run."""
    if value is None:
        return Outcome("no effect here", why="not set")
    if not is_off(settings.get("max_steps")) and other(settings, "max_steps", number) > 0:
        return Outcome("no effect here", why="max_steps is given, which wins")
    return Outcome("carried", {"training.num_train_epochs": number(value)})


@alone
def checkpointing(value: Any) -> Outcome:
    """Recomputation of whole layers, which all four projects mean; by some names with offloading of their inputs."""
    if is_off(value):
        return Outcome("carried", {"checkpointing": "none"})
    if value in ("unsloth", "offload", "offload_disk"):
        moved = _moved(value)
        return Outcome(moved.verdict, {"checkpointing": "layer", **moved.writes}, moved.why)
    if isinstance(value, str) and value.lower() not in ("true", "yes", "1"):
        return Outcome("changed", {"checkpointing": "layer"}, "every layer is recomputed")
    flag(value)
    return Outcome("carried", {"checkpointing": "layer"}, "auto recomputes only what the memory asks for")


@alone
def offloading(value: Any) -> Outcome:
    """Activations in the host's memory; a project's own name for a way to do so, or a flag."""
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    if value not in ("legacy", "hidden_states", "disk"):
        flag(value)
    return _moved(value)


def _moved(how: Any) -> Outcome:
    writes = {"activation_offloading": True}
    if how in ("disk", "offload_disk"):
        return Outcome("changed", writes, "in the host's memory, not on disk")
    return Outcome("carried", writes, "what layers save for backward is in the host's memory meanwhile")


@alone
def _max_steps(value: Any) -> Outcome:
    if is_off(value) or number(value) < 0:
        return Outcome("no effect here", why="epochs are counted")
    return Outcome("carried", {"training.max_steps": count(value)})


@alone
def _report_to(value: Any) -> Outcome:
    if is_off(value) or value == ["none"]:
        return Outcome("carried", {"training.report_to": "none"})
    trackers = texts(value)
    return Outcome("carried", {"training.report_to": trackers[0] if len(trackers) == 1 else trackers})


@alone
def _compiled(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("carried", {"compile": False})
    flag(value)
    return Outcome("carried", {"compile": True}, "one graph for each kind of layer; a graph break is an error")


@alone
def _metric(value: Any) -> Outcome:
    if value in ("loss", "eval_loss", None):
        return Outcome("no effect here", why="the loss is the one that is measured")
    return Outcome("not supported", why="evaluation is the loss per trained token")


@alone
def _greater(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="the smallest loss is the best")
    return Outcome("not supported", why="evaluation is the loss per trained token, and the smallest is the best")


_FLAGS = (
    "logging_first_step disable_tqdm save_only_model load_best_model_at_end dataloader_pin_memory "
    "push_to_hub hub_private_repo hub_always_push full_determinism use_cpu ddp_find_unused_parameters "
    "ddp_broadcast_buffers log_on_each_node save_on_each_node eval_on_start dataloader_drop_last "
    "dataloader_persistent_workers skip_memory_metrics fp16 ddp_static_graph"
)
_NUMBERS = "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm learning_rate eval_delay"
_COUNTS = "gradient_accumulation_steps save_total_limit ddp_timeout ddp_bucket_cap_mb dataloader_prefetch_factor"
_STEPS = "logging_steps save_steps eval_steps"
_TEXTS = (
    "output_dir run_name hub_model_id hub_strategy hub_revision ddp_backend log_level "
    "log_level_replica logging_strategy eval_strategy save_strategy project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id train_sampling_strategy"
)
_WHOLE = "seed data_seed dataloader_num_workers torch_empty_cache_steps"


def _to_training(names: str, read: Any) -> dict[str, Rule]:
    return {name: carried(f"training.{name}", read) for name in names.split()}


_COMMANDS = "the command says what to do: deltatune train"

TRAINING_ARGUMENTS: dict[str, Rule] = {
    **_to_training(_FLAGS, flag),
    **_to_training(_NUMBERS, number),
    **_to_training(_COUNTS, count),
    **_to_training(_STEPS, steps),
    **_to_training(_TEXTS, text),
    **_to_training(_WHOLE, whole),
    "metric_for_best_model": _metric,
    "greater_is_better": _greater,
    "num_train_epochs": epochs,
    "max_steps": _max_steps,
    "optim": optimizer,
    "optim_args": carried("training.optim_args"),
    "optim_target_modules": carried("training.optim_target_modules"),
    "lr_scheduler_type": learning_rate_schedule,
    "lr_scheduler_kwargs": carried("training.lr_scheduler_kwargs", mapping),
    "warmup_ratio": warmup_ratio,
    "warmup_steps": carried("training.warmup_steps", steps),
    "evaluation_strategy": changed("training.eval_strategy", text, "today's name"),
    "report_to": _report_to,
    "tf32": carried("training.tf32", flag, "an error on devices without it"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), checkpointing),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        idle("layers are recomputed without reentrant autograd"),
    ),
    "include_num_input_tokens_seen": carried("training.include_num_input_tokens_seen"),
    "torch_compile": _compiled,
    "torch_compile_backend": idle("layers are compiled by Inductor"),
    "torch_compile_mode": refused("use compile.options"),
    "use_liger_kernel": idle("fused norms, MLPs and a loss without whole logits are built in"),
    "liger_kernel_config": idle("fused norms, MLPs and a loss without whole logits are built in"),
    "packing": idle(PACKED),
    "padding_free": idle(PACKED),
    **dict.fromkeys(("group_by_length", "length_column_name"), idle("packs are all of one length")),
    "per_device_eval_batch_size": idle("evaluation packs as training does"),
    "auto_find_batch_size": refused("a batch is one pack of packing.tokens_per_batch tokens"),
    "remove_unused_columns": idle("packs hold what the model takes"),
    "average_tokens_across_devices": idle("the loss is always divided by all trained tokens"),
    "label_smoothing_factor": refused("the loss without whole logits has no label smoothing"),
    "neftune_noise_alpha": refused("its noise depends on a row's length, and a row is a pack"),
    "fsdp": refused(SHARDING),
    "fsdp_config": refused(SHARDING),
    "deepspeed": refused(SHARDING),
    "accelerator_config": idle("every rank reads its own packs"),
    "parallelism_config": refused(AXES),
    "hub_token": refused("set the HF_TOKEN environment variable"),
    "overwrite_output_dir": idle("a folder with another run's checkpoints or model is never overwritten"),
    "resume_from_checkpoint": refused("use deltatune train --resume"),
    "do_train": idle(_COMMANDS),
    "do_eval": idle(_COMMANDS),
    "do_predict": refused("training alone; generate with the trained model"),
    "local_rank": idle("the launcher sets it"),
    "save_safetensors": idle("files are always safetensors"),
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_use_gather_object", "eval_do_concat_batches", "batch_eval_metrics"),
        idle("evaluation keeps no logits"),
    ),
    "include_for_metrics": idle("an evaluation has no metrics but its losses"),
    **dict.fromkeys(
        ("dataloader_in_order", "dataloader_multiprocessing_context"), idle("packs come in the order of the epoch")
    ),
    "logging_nan_inf_filter": refused("use training.on_nonfinite"),
    "bf16_full_eval": refused("it would round the weights that are saved"),
    "fp16_full_eval": refused("it would round the weights that are saved"),
    "enable_jit_checkpoint": idle("SIGTERM always saves a checkpoint"),
    "ignore_data_skip": refused("a run that goes on does so in its place in the data"),
    "restore_callback_states_from_checkpoint": idle("nothing that watches a run has a state of its own"),
    "debug": refused("use training.on_nonfinite: dump"),
    "label_names": idle("the labels of a pack are known"),
    "prediction_loss_only": idle("evaluation keeps no logits"),
    "logging_dir": refused("set the TENSORBOARD_LOGGING_DIR environment variable"),
    "use_cache": idle("training uses no cache"),
}
