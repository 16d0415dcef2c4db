"""Axolotl's YAML."""

from __future__ import annotations

from typing import Any

from deltatune.importing.axolotl_adapters import ADAPTERS, has_lora, trains_embeddings
from deltatune.importing.axolotl_data import data_sets
from deltatune.importing.axolotl_preferences import PREFERENCES, RL, preference_loss
from deltatune.importing.axolotl_schedule import every, patience, per_epoch, samples, strategy
from deltatune.importing.batches import accumulated, batch_of, length_of
from deltatune.importing.groups import EMBEDDINGS, embedding_rate, learning_rate_groups, unfrozen
from deltatune.importing.lora import EIGHT_BITS, PRODUCTS_IN_FP8, QUANTISED, four_bits
from deltatune.importing.rules import Outcome, Rule, Settings, Table, alone, carried, changed, idle, refused
from deltatune.importing.templates import named_template
from deltatune.importing.tokens import role_of, roles, tokens
from deltatune.importing.training_arguments import (
    AXES,
    PACKED,
    SHARDING,
    TRAINING_ARGUMENTS,
    epochs,
    learning_rate_schedule,
    offloading,
    optimizer,
)
from deltatune.importing.values import count, flag, is_off, mapping, number, text, texts, whole

__all__ = ["AXOLOTL"]

_BUILT_IN = "built in: norms, MLPs, the loss and adapters run fused"
_ATTENTION = "attention over packs is built in"
_TOKENS = "model.added_tokens and model.special_tokens are what a recipe says of tokens"
_AUTO = "transformers' auto classes find the class"
_IMAGES = "text alone trains here; images and audio in data are not read"
_WANDB = "set it in the environment: WANDB_ENTITY and so on"


@alone
def _bf16(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    why = "weights are loaded in it, as there" + ("; auto: where the device has it" if value == "auto" else "")
    return Outcome("changed", {"model.dtype": "bfloat16"}, why)


def _fp16(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    if not is_off(settings.get("bf16")):
        return Outcome("no effect here", why="bf16 is given, which wins")
    # a scaler does not take the gradients of 16-bit weights; those of adapters are float32
    dtype = "float16" if has_lora(settings) else "float32"
    return Outcome("changed", {"model.dtype": dtype, "training.fp16": True}, f"{dtype} weights under autocast")


@alone
def _val_size(value: Any) -> Outcome:
    if is_off(value) or number(value) == 0:
        return Outcome("no effect here", why="nothing is held out")
    found = number(value)
    return Outcome("carried", {"data.val_size": found if found < 1 else whole(value)})


@alone
def _on_inputs(value: Any) -> Outcome:
    return Outcome(
        "carried", {"data.train_on": "all"} if flag(value) else {}, "" if flag(value) else "the default here"
    )


def _template(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    if value == "jinja":
        given = not is_off(settings.get("chat_template_jinja"))
        return Outcome("no effect here" if given else "not supported", why="the text is in chat_template_jinja")
    return named_template(value)


@alone
def _wandb(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    return Outcome("changed", {"training.report_to": "wandb"}, "set WANDB_PROJECT for the project's name")


def _tensorboard(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    if not is_off(settings.get("wandb_project")):
        return Outcome("not supported", why="wandb_project is given: a list in training.report_to names both")
    return Outcome("carried", {"training.report_to": "tensorboard"})


@alone
def _hub(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    return Outcome("carried", {"training.hub_model_id": text(value), "training.push_to_hub": True}, "a name pushes")


@alone
def _plugins(value: Any) -> Outcome:
    names = texts(value) if value else []
    others = [name for name in names if not any(part in name for part in ("cut_cross_entropy", "liger", "kernels"))]
    if others:
        return Outcome("not supported", why=f"{others[0]}: no plugins here")
    return Outcome("no effect here", why=_BUILT_IN)


def _overlong(settings: Settings) -> str:
    fate = {"truncate": "truncate", "raise": "error"}
    return fate.get(str(settings.get("excess_length_strategy")), "drop")


_WHEN_EVALUATED = ("evals_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy")


def _defaults(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"micro_batch_size": 1, "sequence_len": 512, "num_epochs": 1.0, "lr_scheduler": "cosine"}
    if is_off(settings.get("warmup_steps")) and "warmup_ratio" not in settings:
        found["warmup_ratio"] = 0.03
    if all(settings.get(key) is None for key in ("saves_per_epoch", "save_steps", "save_strategy")):
        found["save_strategy"] = "epoch"
    held_out = any(not is_off(settings.get(key)) for key in ("val_set_size", "test_datasets"))
    if held_out and all(settings.get(key) is None for key in _WHEN_EVALUATED):
        found["eval_strategy"] = "epoch"
    if preference_loss(settings) == "simpo":
        # TRL's defaults, which Axolotl hands on
        found |= {"rl_beta": 0.1, "simpo_gamma": 0.5}
    return found


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "base_model": carried("model.name_or_path", text),
    "revision_of_model": carried("model.revision", text),
    "trust_remote_code": carried("model.trust_remote_code", flag),
    "tokenizer_config": carried("model.tokenizer", text),
    "chat_template": _template,
    "chat_template_jinja": carried("model.chat_template", text),
    "chat_template_kwargs": carried("data.chat_template_kwargs", mapping),
    "torch_dtype": carried("model.dtype", text),
    "bf16": _bf16,
    "bfloat16": _bf16,
    "fp16": _fp16,
    "float16": _fp16,
    "sequence_len": length_of(_overlong),
    "excess_length_strategy": idle("in data.overlong, with sequence_len"),
    "micro_batch_size": batch_of(
        "sequence_len",
        packed=lambda settings: not is_off(settings.get("sample_packing")),
        paired=lambda settings: preference_loss(settings) is not None,
    ),
    "num_epochs": epochs,
    "optimizer": optimizer,
    "lr_scheduler": learning_rate_schedule,
    **ADAPTERS,
    "val_set_size": _val_size,
    "evals_per_epoch": per_epoch("eval"),
    "saves_per_epoch": per_epoch("save"),
    "eval_strategy": strategy("eval"),
    "evaluation_strategy": strategy("eval"),
    "save_strategy": strategy("save"),
    "eval_steps": every("eval"),
    "save_steps": every("save"),
    "train_on_inputs": _on_inputs,
    "hub_model_id": _hub,
    "dataset_prepared_path": changed("data.cache_dir", text, "tokenised data is kept there, in a form of its own"),
    **_each("dataset_processes dataset_num_proc", carried("data.num_proc", count)),
    "streaming": carried("data.streaming", flag),
    "adam_eps": carried("training.adam_epsilon", number),
    "wandb_project": _wandb,
    "use_wandb": idle("wandb_project says it"),
    "wandb_name": carried("training.run_name", text),
    **_each("wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode", refused(_WANDB)),
    "use_tensorboard": _tensorboard,
    "load_in_4bit": four_bits(has_lora),
    "load_in_8bit": refused(EIGHT_BITS),
    "bnb_config_kwargs": refused("4 bits are made as nf4 here, their scales in 8 bits, and decoded to model.dtype"),
    "quantize_moe_experts": idle("model.quantization is of experts too"),
    **_each(
        "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config "
        "model_quantization_config_kwargs nvfp4_merge_aware dsv4_fp4_grouped_mode loftq_config loftq_bits peft",
        refused(QUANTISED),
    ),
    **_each("fp8 fp8_config fp8_enable_fsdp_float8_all_gather", refused(PRODUCTS_IN_FP8)),
    **_each(
        "qat quantization llmcompressor use_onebitllms", refused("training in fewer than 16 bits is not supported")
    ),
    **_each(
        "attn_implementation flash_attention sdp_attention xformers_attention flex_attention sage_attention "
        "eager_attention flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_fuse_mlp flash_optimum "
        "flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_d512 "
        "sdpa_varlen gemma4_hybrid_attn_impl large_head_attention pretrain_multipack_attn",
        idle(_ATTENTION),
    ),
    **_each(
        "sample_packing eval_sample_packing sample_packing_group_size sample_packing_eff_est "
        "sample_packing_seq_len_multiplier max_packed_sequence_len sample_packing_bin_size "
        "pad_to_sequence_len pad_to_multiple_of batch_flattening multipack_real_batches "
        "sample_packing_mp_start_method",
        idle(PACKED),
    ),
    "sample_packing_sequentially": refused("use training.train_sampling_strategy: sequential"),
    "curriculum_sampling": refused("use training.train_sampling_strategy: sequential"),
    **_each("eval_batch_size eval_sequence_len", idle("evaluation packs as training does")),
    "batch_size": accumulated,
    **_each(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel fused_attn_kernel use_kernels "
        "cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp use_scattermoe "
        "use_sonicmoe moe_kernels experts_implementation use_glm_dsa_kernels use_dsv4_kernels",
        idle(_BUILT_IN),
    ),
    "plugins": _plugins,
    "special_tokens": roles,
    "tokens": tokens,
    **{role: role_of(role) for role in ("bos_token", "eos_token", "pad_token")},
    "mean_resizing_embeddings": idle("new rows are drawn around the mean of the others"),
    "embeddings_skip_upcast": idle("embeddings are in model.dtype, as other weights"),
    "eot_tokens": idle("the token that ends a turn is found in what the template renders, and trains"),
    **_each(
        "added_tokens_overrides additional_special_tokens resize_token_embeddings_to_32x shrink_embeddings "
        "default_system_message",
        refused(_TOKENS),
    ),
    **_each(
        "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model is_falcon_derived_model base_model_config "
        "model_config_type cls_model_config",
        idle(_AUTO),
    ),
    **_each("tokenizer_use_mistral_common", refused("the tokenizer is transformers'")),
    **_each("processor_type processor_kwargs skip_prepare_dataset image_size image_resize_algorithm", refused(_IMAGES)),
    "freeze_mm_modules": idle("towers of images and audio never train"),
    **PREFERENCES,
    **_each(
        "trl vllm ebft kto_desirable_weight kto_undesirable_weight "
        "reward_model process_reward_model center_rewards_coefficient num_labels diffusion "
        "dpo_use_weighting",
        refused(RL),
    ),
    **_each(
        "fsdp fsdp_config fsdp_version deepspeed dp_shard_size dp_replicate_size fsdp_final_state_dict_type "
        "deepcompile",
        refused(SHARDING),
    ),
    "activation_offloading": offloading,
    **_each(
        "tensor_parallel_size expert_parallel_size context_parallel_size sequence_parallel_degree heads_k_stride "
        "ring_attn_func "
        "expert_parallel_num_nvl_bytes expert_parallel_token_capacity "
        "use_ray ray_num_workers resources_per_worker context_parapllel_size",
        refused(AXES),
    ),
    **_each(
        "layer_offloading ple_cpu_offload experimental_skip_move_to_device "
        "qlora_sharded_model_loading lora_on_cpu max_memory gpu_memory_limit low_cpu_mem_usage device_map",
        refused("weights and optimizer stay on the device; activation_offloading moves activations"),
    ),
    "early_stopping_patience": patience,
    **_each("loss_watchdog_threshold loss_watchdog_patience", refused("a run is not stopped by its loss")),
    **_each(
        "lisa_n_layers lisa_step_interval lisa_layers_attribute relora relora_prune_ratio "
        "relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        refused("an adapter or every weight trains, from start to end"),
    ),
    "unfrozen_parameters": unfrozen,
    "embedding_lr": embedding_rate(EMBEDDINGS, trains_embeddings),
    "embedding_lr_scale": embedding_rate(EMBEDDINGS, trains_embeddings, scale=True),
    "lr_groups": learning_rate_groups,
    **_each(
        "cosine_min_lr_ratio", refused("use lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: min_lr_rate")
    ),
    **_each(
        "cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor eta_min", refused("no schedule of transformers")
    ),
    **_each("use_eaft eaft_alpha eaft_k use_dynamic_finetuning", refused("the loss is cross entropy")),
    **_each("shuffle_merged_datasets shuffle_before_merging_datasets", idle("each epoch has a new random order")),
    **_each("dataset_exact_deduplication min_sample_len max_prompt_len", refused("prepare the data with it")),
    **_each(
        "dataset_keep_in_memory dataset_shard_num dataset_shard_idx streaming_multipack_buffer_size "
        "pretrain_multipack_buffer_size num_dataset_shards_to_save",
        idle("data is read from its cache or streamed"),
    ),
    "push_dataset_to_hub": refused("tokenised data stays local"),
    "hf_use_auth_token": idle("the login of huggingface_hub is used"),
    "model_config": refused("values of the checkpoint's config.json: change them there"),
    "overrides_of_model_config": refused("values of the checkpoint's config.json: change them there"),
    "rope_scaling": refused("values of the checkpoint's config.json: change them there"),
    "llama4_linearized_experts": refused("the checkpoint's own layout of experts is used"),
    "reinit_weights": refused("training starts from the checkpoint's weights"),
    **_each(
        "strict debug ddp fix_untrained_tokens torchdistx_path auto_resume_from_checkpoints gc_steps "
        "gc_collect_steps world_size "
        "eval_table_size eval_max_new_tokens test_value total_num_tokens base_model_ignore_patterns device "
        "is_preprocess preprocess_iterable",
        idle("no part of what is trained"),
    ),
    **_each(
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset",
        refused("evaluation is the loss per trained token"),
    ),
    "generate_samples": samples,
    **_each("num_generation_samples generation_max_new_tokens", idle("in samples, with generate_samples")),
    **_each(
        "generation_temperature generation_top_p generation_top_k generation_do_sample generation_prompt_ratio",
        idle("samples are greedy, and begin where the answer does"),
    ),
    "merge_lora": refused("use deltatune merge"),
    "save_first_step": refused("see training.save_steps"),
}

AXOLOTL = Table(
    "axolotl",
    _RULES,
    _defaults,
    frozenset({"base_model", "micro_batch_size", "sequence_len", "adapter", "num_epochs", "val_set_size"}),
    patterns={
        "liger_.*": idle(_BUILT_IN),
        "gradio_.*": idle("no part of what is trained"),
        "dpo_.*": refused(RL),
        "(use_)?(swanlab|mlflow|comet|trackio|otel_metrics)(_.*)?|hf_mlflow_.*": refused(
            "set training.report_to, and the tracker's own environment variables"
        ),
        "dion_.*|qgalore_.*|adam_(epsilon2|beta3)": refused("no optimizer of transformers"),
        "pose_.*|use_pose": refused("documents keep their positions"),
        "profiler_.*|include_t(okens_per_second|kps)": idle("tokens per second are always logged"),
    },
    sections={
        "datasets": data_sets("train"),
        "pretraining_dataset": data_sets("train", streamed=True),
        "test_datasets": data_sets("eval"),
    },
)
