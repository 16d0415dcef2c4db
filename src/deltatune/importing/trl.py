"""TRL: the YAML of ``trl sft --config`` and ``trl dpo --config``, and their command lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from deltatune.importing.batches import batch_of, length_of
from deltatune.importing.lora import PEFT_TARGETS, QUANTISED, targets, with_lora
from deltatune.importing.paths import is_data_file
from deltatune.importing.preferences import REFERENCE, belongs_to, loss_of
from deltatune.importing.rules import Outcome, Row, Rule, Settings, Table, alone, carried, changed, idle, refused
from deltatune.importing.templates import named_template
from deltatune.importing.tokens import role_of
from deltatune.importing.training_arguments import SHARDING, TRAINING_ARGUMENTS
from deltatune.importing.values import count, flag, is_off, mapping, number, text, texts, whole

__all__ = ["SFT_CONFIG", "TRL", "overlong", "packed"]

_LAUNCH = "the launcher's: deltatune train RECIPE --nproc N"
_OLD = "today's name"


_PREFERENCE_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}
#: Keys of trl.DPOConfig that trl.SFTConfig does not have.
_OF_PREFERENCES = ("beta", "precompute_ref_log_probs", "f_divergence_type", "max_prompt_length", "rpo_alpha")


def _preference(settings: Settings) -> str | None:
    """The loss over pairs of answers that the settings ask for: nothing but its own keys says so."""
    loss = settings.get("loss_type")
    name = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if name is None and any(key in settings for key in _OF_PREFERENCES):
        name = "sigmoid"
    return _PREFERENCE_LOSSES.get(str(name))


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


def _evaluates(settings: Settings) -> bool:
    return settings.get("eval_strategy") not in (None, False, "no")


def _test_split(value: Any, settings: Settings) -> Outcome:
    if not _evaluates(settings) or is_off(settings.get("dataset_name")):
        return Outcome("no effect here", why="nothing is evaluated")
    if is_data_file(settings["dataset_name"]):
        return Outcome("not supported", why="a file is one split, train: set data.val_size, or data.eval")
    writes = {"data.eval.0.path": text(settings["dataset_name"]), "data.eval.0.split": text(value)}
    if not is_off(settings.get("dataset_config")):
        writes["data.eval.0.name"] = text(settings["dataset_config"])
    return Outcome("carried", writes)


def _train_split(value: Any, settings: Settings) -> Outcome:
    if is_data_file(settings.get("dataset_name")) and value == "train":
        return Outcome("no effect here", why="a file is one split, train")
    return Outcome("carried", {"data.train.0.split": text(value)})


@alone
def _test_size(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    return Outcome("carried", {"data.val_size": number(value) if number(value) < 1 else whole(value)})


@alone
def _text_field(value: Any) -> Outcome:
    if value == "text":
        return Outcome("no effect here", why="the default here, where rows have no messages")
    return Outcome("carried", {"data.train.0.format": "text", "data.train.0.columns.text": text(value)})


def _loss(value: Any, settings: Settings) -> Outcome:
    if value in ("nll", "chunked_nll", None):
        return Outcome("no effect here", why="the loss is cross entropy, without whole logits")
    others = "the loss is cross entropy, or one of sigmoid, hinge and ipo on pairs"
    return alone(loss_of(_PREFERENCE_LOSSES, others))(value, settings)


def _fraction(where: str) -> Rule:
    @alone
    def rule(value: Any) -> Outcome:
        if value is None:
            return Outcome("no effect here", why="not set")
        writes = {f"{where}.weight": number(value), "data.weight_by": "documents"}
        return Outcome("changed", writes, "a share of the documents; each epoch takes the next part of a source")

    return rule


@alone
def _weight(value: Any) -> Outcome:
    if value in (1, None):
        return Outcome("no effect here", why="all rows are taken")
    return Outcome("not supported", why=f"{value} of its rows: a slice of the split takes a part, such as train[:10%]")


def _data(value: Any, settings: Settings, here: Path) -> list[Row]:
    del settings, here
    rows: list[Row] = []
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"data.train.{index}"
        rules: dict[str, Rule] = {
            **dict.fromkeys(("path", "id"), carried(f"{where}.path", text)),
            **dict.fromkeys(("name", "config"), carried(f"{where}.name", text)),
            "split": carried(f"{where}.split", text),
            "columns": idle("columns that no format reads are left alone"),
            "fraction": _fraction(where),
            "weight": _weight,
            "data_files": refused("name the file, or a pattern, as the path"),
            "data_dir": refused("name the folder as the path"),
        }
        for key, inner in mapping(entry).items():
            rule = rules.get(key)
            outcome = (
                Outcome("unknown", why="no key of a data set that is known") if rule is None else rule(inner, entry)
            )
            rows.append(Row(f"{index}.{key}", inner, outcome))
    return rows


def _mixture(value: Any, settings: Settings, here: Path) -> list[Row]:
    """``dataset_mixture`` of recipes of the alignment handbook, around the same list."""
    rows: list[Row] = []
    for key, inner in mapping(value).items():
        if key == "datasets":
            rows += [replace(row, key=f"datasets.{row.key}") for row in _data(inner, settings, here)]
        elif key == "test_split_size":
            rows.append(Row(key, inner, _test_size(inner, settings)))
        else:
            rows.append(Row(key, inner, Outcome("no effect here", why="training.seed orders the data")))
    return rows


def _mixer(value: Any, settings: Settings, here: Path) -> list[Row]:
    """``dataset_mixer``: names to the share of their rows that is taken."""
    del settings, here
    return [
        Row(name, share, Outcome("carried" if share == 1 else "changed", {f"data.train.{index}.path": name}, why))
        for index, (name, share) in enumerate(mapping(value).items())
        for why in ("" if share == 1 else "all of its rows: a slice of the split takes a part, such as train[:10%]",)
    ]


def _default_dtype(settings: Settings) -> str | None:
    if "torch_dtype" in settings:
        return None
    # what was in 4 or 8 bits does not become 32
    quantised = not (is_off(settings.get("load_in_4bit")) and is_off(settings.get("load_in_8bit")))
    return "bfloat16" if quantised else "float32"


def _defaults(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_length": 1024 if "max_seq_length" not in settings else None,
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
    if _evaluates(settings) and "dataset_name" in settings:
        found["dataset_test_split"] = "test"
    if _preference(settings) is not None:
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
    "loss_type": _loss,
    "bf16": _bf16,
    "activation_offloading": refused("nothing is moved to the host's memory here"),
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
    "attn_implementation": idle("attention over packs is built in"),
    **_each(
        "per_device_train_batch_size batch_size",
        batch_of("max_length", "max_seq_length", packed=packed, paired=_preference),
    ),
    "beta": belongs_to("beta", _preference),
    "label_smoothing": idle("losses robust and exo_pair alone read it"),
    **_each("precompute_ref_log_probs precompute_ref_batch_size ref_model_init_kwargs", idle(REFERENCE)),
    "disable_dropout": idle("the reference runs without dropout; set lora.lora_dropout"),
    **_each("max_prompt_length max_completion_length", refused("data.max_length bounds prompt and answer together")),
    **_each(
        "rpo_alpha ld_alpha loss_weights use_weighting sync_ref_model reference_free force_use_ref_model",
        refused("preferences have one loss, without further terms"),
    ),
    "dataset_name": carried("data.train.0.path", text),
    "dataset_config": carried("data.train.0.name", text),
    "dataset_train_split": _train_split,
    "dataset_test_split": _test_split,
    "dataset_splits": refused("set data.train[].split, and data.eval"),
    "preprocessing_num_workers": carried("data.num_proc", count),
    "chat_template": alone(named_template),
    "dataset_streaming": carried("data.streaming", flag),
    "streaming": carried("data.streaming", flag),
    "test_split_size": _test_size,
    "ignore_bias_buffers": idle("for data-parallel training of old models"),
    "gradient_accumulation": refused("did you mean gradient_accumulation_steps?"),
    **_each(
        "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", refused(QUANTISED)
    ),
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
        {"dataset_name", "use_peft", "dataset_text_field", "dataset_train_split", "max_length", "assistant_only_loss"}
    ),
    sections={"datasets": _data, "dataset_mixture": _mixture, "dataset_mixer": _mixer},
)
