"""LLaMA-Factory's YAML, its stages sft, pt and dpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.importing.batches import batch_of, length_of
from deltatune.importing.groups import lora_plus, muon
from deltatune.importing.lora import (
    PRODUCTS_IN_FP8,
    bits_of_bitsandbytes,
    kind_of_four_bits,
    new_adapter,
    targets,
    with_lora,
)
from deltatune.importing.preferences import REFERENCE, belongs_to, loss_of, only_with
from deltatune.importing.registry import find_registry, named_sources
from deltatune.importing.rules import Outcome, Row, Rule, Settings, Table, alone, carried, idle, other, refused
from deltatune.importing.templates import named_template
from deltatune.importing.tokens import added_tokens
from deltatune.importing.training_arguments import AXES, PACKED, SHARDING, TRAINING_ARGUMENTS, offloading
from deltatune.importing.values import count, flag, is_off, number, text, texts, whole

__all__ = ["LLAMA_FACTORY"]

_BUILT_IN = "built in: norms, MLPs, the loss and adapters run fused"
_LOSS = "the loss is cross entropy"
_ONE_OF_TWO = "an adapter or every weight trains"
_NO_OPTIMIZER = "no optimizer of transformers that is known to work here"
_NEW_TOKENS = ("add_tokens", "new_special_tokens", "add_special_tokens")  # the second is an earlier name of the third
_TOKENS = "model.added_tokens and model.special_tokens are what a recipe says of tokens"


_PREFERENCE_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def _preference(settings: Settings) -> str | None:
    """The loss over pairs of answers that the file asks for."""
    loss = settings.get("pref_loss") or "sigmoid"
    return _PREFERENCE_LOSSES.get(str(loss)) if settings.get("stage") == "dpo" else None


def _preference_stage(settings: Settings) -> str | None:
    return "dpo" if settings.get("stage") == "dpo" else None


def _has_lora(settings: Settings) -> bool:
    return str(settings.get("finetuning_type", "lora")) == "lora"


@alone
def _stage(value: Any) -> Outcome:
    if value == "sft":
        return Outcome("carried", why="what a recipe does")
    if value == "pt":
        return Outcome("changed", {"data.train.0.format": "text"}, "text that trains as a whole")
    if value == "dpo":
        return Outcome("carried", why="preferences, by the loss of pref_loss")
    return Outcome("not supported", why="stages sft, pt and dpo alone: the recipe below is for stage sft")


@alone
def _finetuning_type(value: Any) -> Outcome:
    if value == "lora":
        return Outcome("carried", {"lora": {}})
    if value == "full":
        return Outcome("carried", why="without a section lora every weight trains")
    return Outcome("not supported", why=f"{_ONE_OF_TWO}: this recipe trains every weight")


def _alpha(value: Any, settings: Settings) -> Outcome:
    ours = 2 * other(settings, "lora_rank", count, 8) if value is None else whole(value)
    return Outcome("carried", {"lora.lora_alpha": ours})


def _pissa(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    rounds = other(settings, "pissa_iter", whole, 16)
    return Outcome("carried", {"lora.init_lora_weights": "pissa" if rounds == -1 else f"pissa_niter_{rounds}"})


def _bf16(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    if _has_lora(settings) or not is_off(settings.get("pure_bf16")):
        return Outcome(
            "changed", {"model.dtype": "bfloat16"}, "weights are loaded in it, as there; adapters are float32"
        )
    writes = {"model.dtype": "float32", "training.bf16": True}
    return Outcome("changed", writes, "float32 weights under autocast, as there")


@alone
def _pure(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    return Outcome("carried", {"model.dtype": "bfloat16"})


@alone
def _no_checkpointing(value: Any) -> Outcome:
    off = flag(value)
    return Outcome("carried", {"checkpointing": "none" if off else "layer"}, "" if off else "the default there")


def _unsloth_checkpointing(value: Any, settings: Settings) -> Outcome:
    if not is_off(settings.get("disable_gradient_checkpointing")):
        return Outcome("no effect here", why="disable_gradient_checkpointing is given, which wins")
    return offloading(value, settings)


def _patience(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    if is_off(settings.get("eval_strategy")):
        return Outcome("no effect here", why="nothing is evaluated")
    return Outcome("carried", {"training.early_stopping_patience": count(value)})


def _adapter(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    names = texts(value)
    if len(names) > 1 or not is_off(settings.get("create_new_adapter")):
        return Outcome("not supported", why="an adapter over others: merge them into the base first (deltatune merge)")
    return Outcome("carried", {"lora.name_or_path": names[0]}, "its ranks and targets are its own")


@alone
def _new(value: Any) -> Outcome:
    return Outcome("no effect here", why="off there too" if is_off(value) else "said at adapter_name_or_path")


@alone
def _val_size(value: Any) -> Outcome:
    if is_off(value) or number(value) == 0:
        return Outcome("no effect here", why="nothing is held out")
    return Outcome("carried", {"data.val_size": number(value) if number(value) < 1 else whole(value)})


@alone
def _on_prompt(value: Any) -> Outcome:
    on = flag(value)
    return Outcome("carried", {"data.train_on": "all" if on else "assistant"})


@alone
def _mask_history(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    return Outcome("carried", {"data.train_on": "last"})


@alone
def _thinking(value: Any) -> Outcome:
    if value is None:
        return Outcome("no effect here", why="not set")
    return Outcome(
        "carried", {"data.chat_template_kwargs": {"enable_thinking": flag(value)}}, "if the template reads it"
    )


@alone
def _max_samples(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    return Outcome("changed", why=f"data.train[].limit: {count(value)}, the first so many rows, not random ones")


def _data(part: str) -> Any:
    def rows(value: Any, settings: Settings, here: Path) -> list[Row]:
        folder = str(settings.get("dataset_dir") or "data")
        limit = None if is_off(settings.get("max_samples")) else other(settings, "max_samples", count)
        return named_sources(part, value, find_registry(folder, here), folder, limit)

    return rows


def _overlong(settings: Settings) -> str:
    del settings
    return "truncate"


def _defaults(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "disable_gradient_checkpointing": False,
        "finetuning_type": "lora",
    }
    if (loss := _preference(settings)) is not None:
        found |= {"pref_loss": "sigmoid", "pref_beta": 0.1, **({"simpo_gamma": 0.5} if loss == "simpo" else {})}
    if _has_lora(settings):
        rank = settings.get("lora_rank", 8)
        found |= {"lora_rank": 8, "lora_alpha": 2 * rank if isinstance(rank, int) else None, "lora_target": "all"}
    return found


_LORA: dict[str, Rule] = {
    "lora_rank": carried("lora.r", count),
    "lora_alpha": _alpha,
    "lora_dropout": carried("lora.lora_dropout", number),
    "lora_target": targets,
    "additional_target": carried("lora.modules_to_save", texts),
    "use_rslora": carried("lora.use_rslora", flag),
    "use_dora": carried("lora.use_dora", flag, "needs compile.strict: false with compile"),
    "pissa_init": _pissa,
    "pissa_iter": idle("in lora.init_lora_weights, with pissa_init"),
    "pissa_convert": refused("deltatune merge makes a plain checkpoint of the adapter"),
}

_LORA_RULES = {
    **{key: with_lora(new_adapter("adapter_name_or_path", key, rule), _has_lora) for key, rule in _LORA.items()},
    "adapter_name_or_path": with_lora(_adapter, _has_lora),
    "create_new_adapter": with_lora(_new, _has_lora),
    "loraplus_lr_ratio": with_lora(lora_plus("loraplus_lr_ratio"), _has_lora),
    "loraplus_lr_embedding": with_lora(lora_plus("loraplus_lr_embedding"), _has_lora),
}


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "stage": _stage,
    "finetuning_type": _finetuning_type,
    **_LORA_RULES,
    "model_name_or_path": carried("model.name_or_path", text),
    "model_revision": carried("model.revision", text),
    "trust_remote_code": carried("model.trust_remote_code", flag),
    "template": alone(named_template),
    "enable_thinking": _thinking,
    "dataset_dir": idle("where data sets are looked up"),
    "max_samples": _max_samples,
    "cutoff_len": length_of(_overlong),
    "per_device_train_batch_size": batch_of(
        "cutoff_len",
        packed=lambda settings: not (is_off(settings.get("packing")) and is_off(settings.get("neat_packing"))),
        paired=lambda settings: _preference(settings) is not None,
    ),
    "pref_loss": only_with(
        _preference_stage, alone(loss_of(_PREFERENCE_LOSSES, f"expected {', '.join(_PREFERENCE_LOSSES)}"))
    ),
    "pref_beta": belongs_to("beta", _preference),
    "simpo_gamma": belongs_to("gamma", _preference, "simpo"),
    "dpo_label_smoothing": belongs_to("label_smoothing", _preference, "dpo"),
    **_each("pref_ftx pref_bco_weight ld_alpha", refused("preferences have one loss, without further terms")),
    "neat_packing": idle(PACKED),
    "val_size": _val_size,
    "train_on_prompt": _on_prompt,
    "mask_history": _mask_history,
    "streaming": carried("data.streaming", flag),
    "preprocessing_num_workers": carried("data.num_proc", count),
    "bf16": _bf16,
    "pure_bf16": _pure,
    "disable_gradient_checkpointing": _no_checkpointing,
    **_each("flash_attn attn", idle("attention over packs is built in")),
    "early_stopping_steps": _patience,
    **dict.fromkeys(_NEW_TOKENS, added_tokens(*_NEW_TOKENS)),
    "resize_vocab": idle("embeddings grow where tokens need it"),
    "use_muon": muon,
    "quantization_bit": bits_of_bitsandbytes(_has_lora, "quantization_method"),
    "quantization_method": idle("quantization_bit says it"),
    "quantization_type": kind_of_four_bits,
    "double_quantization": idle("scales of 4 bits are in 8"),
    "quantization_device_map": idle("the device is the run's"),
    **_each("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather", refused(PRODUCTS_IN_FP8)),
    **_each("enable_liger_kernel use_v1_kernels use_unsloth", idle(_BUILT_IN)),
    "use_unsloth_gc": _unsloth_checkpointing,
    **_each(
        "plot_loss include_effective_tokens_per_second include_mfu print_param_status compute_accuracy",
        idle("the loss and tokens per second are always logged"),
    ),
    **_each(
        "overwrite_cache preprocessing_batch_size data_shared_file_system buffer_size",
        idle("the cache tells what changed"),
    ),
    **_each("tokenized_path cache_dir", idle("tokenised data is kept in data.cache_dir")),
    **_each(
        "use_fast_tokenizer low_cpu_mem_usage use_reentrant_gc block_diag_attn ignore_pad_token_for_loss "
        "ddp_timeout_seconds infer_backend infer_dtype use_kv_cache",
        idle("no part of what is trained"),
    ),
    **_each(
        "new_special_tokens_config init_special_tokens split_special_tokens default_system tool_format",
        refused(_TOKENS),
    ),
    **_each("freeze_vision_tower freeze_multi_modal_projector", idle("towers of images never train")),
    **_each(
        "freeze_language_model media_dir image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps "
        "video_maxlen image_do_pan_and_scan crop_to_patches use_audio_in_video audio_sampling_rate",
        refused("text alone trains here"),
    ),
    **_each("mix_strategy interleave_probs", refused("sources are mixed whole, or by data.train[].weight")),
    **_each(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro mixture_of_depths "
        "module_dropout",
        refused(_ONE_OF_TWO),
    ),
    **_each("use_dft_loss use_eaft_loss eaft_alpha use_asft_loss asft_alpha", refused(_LOSS)),
    "use_adam_mini": refused(_NO_OPTIMIZER),
    **_each(
        "rope_scaling shift_attn moe_aux_loss_coef",
        refused("values of the checkpoint's config.json: change them there"),
    ),
    **_each(
        "upcast_layernorm upcast_lmhead_output train_from_scratch",
        refused("the checkpoint's weights train in model.dtype"),
    ),
    "disable_shuffling": refused("use training.train_sampling_strategy: sequential"),
    **_each("predict_with_generate eval_on_each_dataset", refused("evaluation is the loss per trained token")),
    **_each("ref_model ref_model_adapters", refused(REFERENCE)),
    "fsdp_transformer_layer_cls_to_wrap": refused(SHARDING),
    **_each("reward_model ppo_epochs", refused("no reinforcement learning")),
    **_each(
        "sequence_parallel tensor_model_parallel_size use_mca "
        "pipeline_model_parallel_size expert_model_parallel_size virtual_pipeline_model_parallel_size "
        "bias_activation_fusion apply_rope_fusion use_distributed_optimizer overlap_param_gather "
        "overlap_grad_reduce moe_grouped_gemm moe_token_dispatcher_type recompute_granularity "
        "placement_strategy resources_per_worker",
        refused(AXES),
    ),
    **_each("use_kt cpu_infer chunk_size", refused("nothing is moved to the host's memory here")),
}

LLAMA_FACTORY = Table(
    "llamafactory",
    _RULES,
    _defaults,
    frozenset({"stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "lora_target", "quantization_bit"}),
    patterns={
        "(use_)?(galore|apollo|badam)(_.*)?": refused(_NO_OPTIMIZER),
        "oft_.*": refused("lora is the one adapter of recipes"),
        "(pref|dpo|kto|ppo|simpo|ld)_.*": refused("supervised fine-tuning and preferences in pairs alone"),
        "kt_.*": refused("nothing is moved to the host's memory here"),
        "ray_.*": refused(AXES),
        "(use_)?swanlab(_.*)?": refused("set training.report_to, and the tracker's own environment variables"),
        "export_.*": refused("use deltatune merge"),
        "(vllm|sglang)_.*": idle("no part of what is trained"),
        "use_habana|use_lazy_mode|gaudi_.*": idle("the device is found, and nothing is said of it"),
        "raft_.*": refused("prepare the data with it: documents beside the question, as messages"),
    },
    sections={"dataset": _data("train"), "eval_dataset": _data("eval")},
)
