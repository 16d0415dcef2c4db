"""TRL: the YAML of ``trl sft --config`` and ``trl dpo --config``, and their command lines."""

from __future__ import annotations

from typing import Any

from deltatune.importing.batches import batch_of, length_of
from deltatune.importing.lora import EIGHT_BITS, PEFT_TARGETS, four_bits, kind_of_four_bits, targets, with_lora
from deltatune.importing.rules import Outcome, Rule, Settings, Table, alone, carried, changed, idle, refused
from deltatune.importing.templates import named_template
from deltatune.importing.tokens import role_of
from deltatune.importing.training_arguments import SHARDING, TRAINING_ARGUMENTS, offloading
from deltatune.importing.trl_data import DATA, SECTIONS, evaluates
from deltatune.importing.trl_preferences import loss_type, of_pairs, preference_loss
from deltatune.importing.values import count, flag, is_off, number, text, texts, whole

__all__ = ["SFT_CONFIG", "TRL", "overlong", "packed"]

_LAUNCH = "the launcher's: deltatune train RECIPE --nproc N"
_OLD = "today's name"


def _has_lora(settings: Settings) -> bool:
    return not is_off(settings.get("use_peft"))


def packed(settings: Settings) -> bool:
    """Whether rows are packs there."""
    return not is_off(settings.get("packing"))


def overlong(settings: Settings) -> str:
    """What becomes of documents that are too long: cut, or with some ways to pack cut into several."""
    return "split" if packed(settings) and settings.get("packing_strategy") in ("bfd_split", "wrapped") else "truncate"


@alone
def _peft(value: Any) -> Outcome:
    return (
        Outcome("carried", {"lora": {}}) if not is_off(value) else Outcome("no effect here", why="every weight trains")
    )


def _bf16(value: Any, settings: Settings) -> Outcome:
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    if is_off(value):
        return Outcome("carried", {"training.bf16": False})
    flag(value)
    if dtype in ("bfloat16", "float16", "auto"):
        return Outcome("no effect here", why=f"autocast does nothing where weights are {dtype}")
    return Outcome("carried", {"training.bf16": True})


def _assistant(value: Any, settings: Settings) -> Outcome:
    if not is_off(value):
        return Outcome("carried", {"data.train_on": "assistant"})
    if not is_off(settings.get("completion_only_loss")):
        return Outcome("no effect here", why="completion_only_loss says what trains")
    why = "all of a conversation trains there; of rows with prompt and completion only that: then leave it out"
    return Outcome("changed", {"data.train_on": "all"}, why)


@alone
def _completion(value: Any) -> Outcome:
    if value is None:
        return Outcome("no effect here", why="not set")
    if flag(value):
        return Outcome("carried", {"data.train_on": "assistant"}, "completions train, prompts do not")
    return Outcome("carried", {"data.train_on": "all"})


@alone
def _text_field(value: Any) -> Outcome:
    if value == "text":
        return Outcome("no effect here", why="the default here, where rows have no messages")
    return Outcome("carried", {"data.train.0.format": "text", "data.train.0.columns.text": text(value)})


def _default_dtype(settings: Settings) -> str | None:
    if "torch_dtype" in settings:
        return None
    # what was in 4 or 8 bits does not become 32
    quantised = not (is_off(settings.get("load_in_4bit")) and is_off(settings.get("load_in_8bit")))
    return "bfloat16" if quantised else "float32"


def _defaults(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_length": None if {"max_seq_length", "seq_length"} & set(settings) else 1024,
        "per_device_train_batch_size": 8 if "batch_size" not in settings else None,
        "learning_rate": 2e-5,
        "gradient_checkpointing": True,
        "bf16": is_off(settings.get("fp16")),
        "dtype": _default_dtype(settings),
        "assistant_only_loss": False,
    }
    if _has_lora(settings):
        found |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
        if is_off(settings.get("lora_target_parameters")):
            found["lora_target_modules"] = PEFT_TARGETS
    if evaluates(settings) and "dataset_name" in settings:
        found["dataset_test_split"] = "test"
    if preference_loss(settings) is not None:
        found |= {"learning_rate": 1e-6, "loss_type": "sigmoid", "assistant_only_loss": None}
    return {key: value for key, value in found.items() if value is not None}


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


SFT_CONFIG: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "max_length": length_of(overlong),
    "max_seq_length": length_of(overlong),
    "packing_strategy": idle("packs are filled best-fit; what is too long is in data.overlong"),
    "eval_packing": idle("evaluation packs as training does"),
    "pad_to_multiple_of": idle("packs are all of one length"),
    "truncation_mode": idle("the beginning of a document is kept"),
    "shuffle_dataset": idle("each epoch has a new random order"),
    "dataset_text_field": _text_field,
    "dataset_num_proc": carried("data.num_proc", count),
    "dataset_kwargs": refused("rows are tokenised by their format"),
    "completion_only_loss": _completion,
    "assistant_only_loss": _assistant,
    "loss_type": loss_type,
    "bf16": _bf16,
    "activation_offloading": offloading,
    "chat_template_path": carried("model.chat_template", text, "a Jinja file; of a tokenizer, its chat_template.jinja"),
    "router_aux_loss_coef": refused("a value of the checkpoint's config.json: change it there"),
    "trust_remote_code": carried("model.trust_remote_code", flag),
    "model_init_kwargs": refused("see the section model"),
    **{role: role_of(role) for role in ("eos_token", "pad_token")},
}
"""What trl.SFTConfig adds to TrainingArguments."""

_LORA: dict[str, Rule] = {
    "lora_r": carried("lora.r", count),
    "lora_alpha": carried("lora.lora_alpha", whole),
    "lora_dropout": carried("lora.lora_dropout", number),
    "lora_target_modules": targets,
    "lora_target_parameters": carried("lora.target_parameters", texts),
    "lora_modules_to_save": carried("lora.modules_to_save", texts),
    "use_rslora": carried("lora.use_rslora", flag),
    "use_dora": carried("lora.use_dora", flag, "needs compile.strict: false with compile"),
    "lora_task_type": idle("causal language models"),
}

_RULES: dict[str, Rule] = {
    **SFT_CONFIG,
    "use_peft": _peft,
    **{key: with_lora(rule, _has_lora) for key, rule in _LORA.items()},
    "model_name_or_path": carried("model.name_or_path", text),
    "model_name": changed("model.name_or_path", text, _OLD),
    "model_revision": carried("model.revision", text),
    "dtype": carried("model.dtype", text),
    "torch_dtype": changed("model.dtype", text, _OLD),
    **_each("attn_implementation use_flash_attention_2", idle("attention over packs is built in")),
    "seq_length": length_of(overlong),
    **_each(
        "per_device_train_batch_size batch_size",
        batch_of("max_length", "max_seq_length", "seq_length", packed=packed, paired=preference_loss),
    ),
    **of_pairs(preference_loss),
    **DATA,
    "preprocessing_num_workers": carried("data.num_proc", count),
    "chat_template": alone(named_template),
    "ignore_bias_buffers": idle("for data-parallel training of old models"),
    "gradient_accumulation": refused("did you mean gradient_accumulation_steps?"),
    "load_in_4bit": four_bits(_has_lora),
    "load_in_8bit": refused(EIGHT_BITS),
    "bnb_4bit_quant_type": kind_of_four_bits,
    "use_bnb_nested_quant": idle("scales of 4 bits are in 8"),
    "bnb_4bit_quant_storage": idle("for shards, which no base in few bits is divided into"),
    "log_with": changed("training.report_to", text, _OLD),
    "env": refused("set environment variables in the shell"),
    "config": refused("the file could not be read: import it by itself"),
    **_each(
        "accelerate_config config_file num_processes num_machines mixed_precision main_process_port", idle(_LAUNCH)
    ),
    **_each("use_deepspeed use_fsdp", refused(SHARDING)),
}

TRL = Table(
    "trl",
    _RULES,
    _defaults,
    frozenset(
        (
            *("dataset_name", "dataset_train_split", "dataset_mixer", "dataset_mixture", "dataset_splits"),
            *("use_peft", "dataset_text_field", "max_length", "max_seq_length", "assistant_only_loss"),
        )
    ),
    patterns={
        r"trl \w+ \(command .*": refused(
            "a recipe is one run: the first such command is taken, give others a file each"
        ),
        r"\$.*": refused("flags that the script computes: add them to the recipe"),
        "wandb_.*": refused("set it in the environment: WANDB_NAME, WANDB_RUN_GROUP and so on"),
    },
    sections=SECTIONS,
)
