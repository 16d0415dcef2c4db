"""Single keys: what they become, by hand."""

import contextlib
import dataclasses

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from deltatune.config.refused import REFUSED_TRAINING_NAMES
from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError
from deltatune.importing import training_arguments
from deltatune.importing.axolotl import AXOLOTL
from deltatune.importing.llama_factory import LLAMA_FACTORY
from deltatune.importing.lora import NF4
from deltatune.importing.rules import Outcome
from deltatune.importing.trl import TRL
from deltatune.importing.unsloth import UNSLOTH
from deltatune.importing.values import NotLiteral


def outcome(table, key, value, **others) -> Outcome:
    return table.rules[key](value, {**others, key: value})


@pytest.mark.parametrize(
    ("table", "key", "value", "others", "writes"),
    [
        (LLAMA_FACTORY, "new_special_tokens", "<x>,<y>", {}, {"model.added_tokens": ["<x>", "<y>"]}),
        (AXOLOTL, "micro_batch_size", 2, {"sequence_len": 4096}, {"packing.tokens_per_batch": 8192}),
        (AXOLOTL, "sequence_len", 512, {}, {"data.max_length": 512, "data.overlong": "drop"}),
        (
            AXOLOTL,
            "sequence_len",
            512,
            {"excess_length_strategy": "truncate"},
            {"data.max_length": 512, "data.overlong": "truncate"},
        ),
        (AXOLOTL, "saves_per_epoch", 1, {}, {"training.save_strategy": "epoch"}),
        (
            AXOLOTL,
            "saves_per_epoch",
            2,
            {"num_epochs": 4},
            {"training.save_strategy": "steps", "training.save_steps": 0.125},
        ),
        (AXOLOTL, "saves_per_epoch", 1, {"max_steps": 10}, {"training.save_strategy": "epoch"}),
        (
            AXOLOTL,
            "saves_per_epoch",
            1,
            {"max_steps": 10, "num_epochs": 4},
            {"training.save_strategy": "steps", "training.save_steps": 0.25},
        ),
        (AXOLOTL, "evals_per_epoch", 1, {"val_set_size": 0.1}, {"training.eval_strategy": "epoch"}),
        (AXOLOTL, "evals_per_epoch", 1, {"val_set_size": 0.0}, {}),
        (AXOLOTL, "val_set_size", 100, {}, {"data.val_size": 100}),
        (AXOLOTL, "warmup_ratio", 0.1, {"warmup_steps": 5}, {}),
        (AXOLOTL, "warmup_steps", 5, {}, {"training.warmup_steps": 5}),
        (AXOLOTL, "num_epochs", 3, {"max_steps": 10}, {}),
        (AXOLOTL, "learning_rate", "2e-4", {}, {"training.learning_rate": 0.0002}),
        (AXOLOTL, "adapter", "qlora", {}, {"lora": {}, **NF4}),
        (AXOLOTL, "load_in_4bit", True, {"adapter": "qlora"}, NF4),
        (AXOLOTL, "load_in_4bit", True, {}, {}),
        (AXOLOTL, "load_in_8bit", True, {"adapter": "lora"}, {}),
        (LLAMA_FACTORY, "quantization_bit", 4, {}, NF4),
        (LLAMA_FACTORY, "quantization_bit", 4, {"quantization_method": "bnb"}, NF4),
        (LLAMA_FACTORY, "quantization_bit", 4, {"quantization_method": "hqq"}, {}),
        (LLAMA_FACTORY, "quantization_bit", 4, {"finetuning_type": "full"}, {}),
        (LLAMA_FACTORY, "quantization_bit", 8, {}, {}),
        (TRL, "load_in_4bit", True, {"use_peft": True}, NF4),
        (TRL, "load_in_4bit", True, {}, {}),
        (UNSLOTH, "load_in_4bit", True, {"get_peft_model": True}, NF4),
        (AXOLOTL, "lora_r", 8, {"adapter": None}, {}),
        (AXOLOTL, "lora_target_linear", True, {"adapter": "lora"}, {"lora.target_modules": "all-linear"}),
        (AXOLOTL, "train_on_inputs", True, {}, {"data.train_on": "all"}),
        (AXOLOTL, "wandb_project", "mine", {}, {"training.report_to": "wandb"}),
        (AXOLOTL, "hub_model_id", "me/m", {}, {"training.hub_model_id": "me/m", "training.push_to_hub": True}),
        (AXOLOTL, "torch_compile", True, {}, {"compile": True}),
        (AXOLOTL, "fp16", True, {}, {"model.dtype": "float32", "training.fp16": True}),
        (AXOLOTL, "fp16", True, {"adapter": "lora"}, {"model.dtype": "float16", "training.fp16": True}),
        (AXOLOTL, "fp16", True, {"bf16": "auto"}, {}),
        (AXOLOTL, "save_steps", 5, {}, {"training.save_strategy": "steps", "training.save_steps": 5}),
        (AXOLOTL, "save_strategy", "epoch", {"save_steps": 5}, {}),
        (AXOLOTL, "save_strategy", "epoch", {}, {"training.save_strategy": "epoch"}),
        (AXOLOTL, "eval_steps", 5, {}, {}),
        (
            AXOLOTL,
            "lora_target_parameters",
            ["experts.gate_up_proj", "experts.down_proj"],
            {"adapter": "lora"},
            {"lora.target_parameters": "all-experts"},
        ),
        (
            AXOLOTL,
            "special_tokens",
            {"pad_token": "<p>", "bos_token": None},
            {},
            {"model.special_tokens.pad_token": "<p>"},
        ),
        (AXOLOTL, "special_tokens", {"additional_special_tokens": ["<a>"]}, {}, {}),
        (
            AXOLOTL,
            "generate_samples",
            True,
            {"val_set_size": 0.1, "num_generation_samples": 2},
            {"samples.held_out": 2, "samples.max_new_tokens": 50},
        ),
        (AXOLOTL, "generate_samples", True, {}, {}),
        (AXOLOTL, "tokens", ["<a>", "<b>"], {}, {"model.added_tokens": ["<a>", "<b>"]}),
        (
            LLAMA_FACTORY,
            "add_tokens",
            "<a>,<b>",
            {"add_special_tokens": "<c>"},
            {"model.added_tokens": ["<a>", "<b>", "<c>"]},
        ),
        (TRL, "eos_token", "<|im_end|>", {}, {"model.special_tokens.eos_token": "<|im_end|>"}),
        (AXOLOTL, "early_stopping_patience", 3, {"val_set_size": 0.1}, {"training.early_stopping_patience": 3}),
        (AXOLOTL, "early_stopping_patience", 3, {}, {}),
        (AXOLOTL, "loraplus_lr_ratio", 16, {"adapter": "lora"}, {"training.loraplus_lr_ratio": 16}),
        (AXOLOTL, "loraplus_lr_embedding", 1e-6, {"adapter": "lora"}, {}),
        (AXOLOTL, "lora_model_dir", "./a", {"adapter": "qlora"}, {"lora.name_or_path": "./a"}),
        (AXOLOTL, "lora_r", 8, {"adapter": "lora", "lora_model_dir": "./a"}, {}),
        (AXOLOTL, "lora_dropout", 0.1, {"adapter": "lora", "lora_model_dir": "./a"}, {"lora.lora_dropout": 0.1}),
        (AXOLOTL, "embedding_lr", 1e-5, {}, {"training.learning_rates.embed_tokens|lm_head": 1e-5}),
        (AXOLOTL, "embedding_lr", 1e-5, {"adapter": "lora"}, {}),
        (
            AXOLOTL,
            "embedding_lr_scale",
            0.5,
            {"adapter": "lora", "lora_modules_to_save": ["lm_head"], "learning_rate": 1e-4},
            {"training.learning_rates.embed_tokens|lm_head": 5e-5},
        ),
        (
            AXOLOTL,
            "lr_groups",
            [{"name": "o", "modules": ["o_proj.", "q_proj"], "lr": 1e-5}],
            {},
            {r"training.learning_rates.o_proj\.|q_proj": 1e-5},
        ),
        (
            AXOLOTL,
            "unfrozen_parameters",
            ["^lm_head.weight$", "model.layers.4[4-7]+.mlp.[a-z]+$"],
            {},
            {"training.unfrozen_parameters": [r"^lm_head\.weight$", r"^model\.layers\.4[4-7]+\.mlp\.[a-z]+$"]},
        ),
        (AXOLOTL, "unfrozen_parameters", ["model.embed_tokens.weight$[:32000]"], {}, {}),
        (AXOLOTL, "unfrozen_parameters", [r"^lm_head\..*"], {}, {}),
        (LLAMA_FACTORY, "early_stopping_steps", 2, {"eval_strategy": "steps"}, {"training.early_stopping_patience": 2}),
        (LLAMA_FACTORY, "use_muon", True, {}, {"training.optim": "muon"}),
        (LLAMA_FACTORY, "loraplus_lr_ratio", 16.0, {}, {"training.loraplus_lr_ratio": 16.0}),
        (LLAMA_FACTORY, "adapter_name_or_path", "a/b", {}, {"lora.name_or_path": "a/b"}),
        (LLAMA_FACTORY, "adapter_name_or_path", "a,b", {}, {}),
        (LLAMA_FACTORY, "adapter_name_or_path", "a", {"create_new_adapter": True}, {}),
        (LLAMA_FACTORY, "lora_target", "all", {"adapter_name_or_path": "a"}, {}),
        (
            UNSLOTH,
            "embedding_learning_rate",
            1e-5,
            {"target_modules": ["q_proj", "lm_head"]},
            {r"training.learning_rates.modules_to_save\.default\.weight$": 1e-5},
        ),
        (UNSLOTH, "embedding_learning_rate", 1e-5, {"target_modules": ["q_proj"]}, {}),
        (TRL, "metric_for_best_model", "eval_loss", {}, {}),
        (LLAMA_FACTORY, "cutoff_len", 512, {}, {"data.max_length": 512, "data.overlong": "truncate"}),
        (LLAMA_FACTORY, "lora_target", "all", {}, {"lora.target_modules": "all-linear"}),
        (LLAMA_FACTORY, "lora_rank", 8, {"finetuning_type": "full"}, {}),
        (LLAMA_FACTORY, "bf16", True, {"finetuning_type": "lora"}, {"model.dtype": "bfloat16"}),
        (LLAMA_FACTORY, "bf16", True, {"finetuning_type": "full"}, {"model.dtype": "float32", "training.bf16": True}),
        (LLAMA_FACTORY, "disable_gradient_checkpointing", True, {}, {"checkpointing": "none"}),
        (LLAMA_FACTORY, "pissa_init", True, {"pissa_iter": 16}, {"lora.init_lora_weights": "pissa_niter_16"}),
        (LLAMA_FACTORY, "train_on_prompt", True, {}, {"data.train_on": "all"}),
        (LLAMA_FACTORY, "mask_history", True, {}, {"data.train_on": "last"}),
        (LLAMA_FACTORY, "template", "llama3", {}, {"model.chat_template": "llama3"}),
        (LLAMA_FACTORY, "template", "qwen2_vl", {}, {}),
        (TRL, "report_to", [], {}, {"training.report_to": "none"}),
        (TRL, "report_to", "wandb,tensorboard", {}, {"training.report_to": ["wandb", "tensorboard"]}),
        (TRL, "logging_steps", 0.5, {}, {"training.logging_steps": 0.5}),
        (TRL, "bf16", True, {"dtype": "float32"}, {"training.bf16": True}),
        (TRL, "bf16", True, {"dtype": "bfloat16"}, {}),
        (TRL, "per_device_train_batch_size", 2, {"max_seq_length": 512}, {"packing.tokens_per_batch": 1024}),
        (TRL, "per_device_train_batch_size", 2, {"max_length": None}, {}),
        (TRL, "assistant_only_loss", False, {}, {"data.train_on": "all"}),
        (TRL, "assistant_only_loss", False, {"completion_only_loss": True}, {}),
        (TRL, "dataset_test_split", "test", {"dataset_name": "x.jsonl", "eval_strategy": "epoch"}, {}),
        (TRL, "dataset_train_split", "train", {"dataset_name": "x.jsonl"}, {}),
        (TRL, "dataset_text_field", "body", {}, {"data.train.0.format": "text", "data.train.0.columns.text": "body"}),
        (UNSLOTH, "model_name", "unsloth/M-bnb-4bit", {}, {"model.name_or_path": "unsloth/M"}),
        (
            UNSLOTH,
            "model_name",
            "unsloth/M-bnb-4bit",
            {"get_peft_model": True},
            {"model.name_or_path": "unsloth/M", **NF4},
        ),
        (
            UNSLOTH,
            "use_gradient_checkpointing",
            "unsloth",
            {},
            {"checkpointing": "layer", "activation_offloading": True},
        ),
        (
            AXOLOTL,
            "gradient_checkpointing",
            "offload_disk",
            {},
            {"checkpointing": "layer", "activation_offloading": True},
        ),
        (AXOLOTL, "gradient_checkpointing", "selective", {}, {"checkpointing": "layer"}),
        (AXOLOTL, "activation_offloading", True, {}, {"activation_offloading": True}),
        (AXOLOTL, "activation_offloading", "legacy", {}, {"activation_offloading": True}),
        (AXOLOTL, "activation_offloading", False, {}, {}),
        (TRL, "activation_offloading", "true", {}, {"activation_offloading": True}),
        (LLAMA_FACTORY, "use_unsloth_gc", True, {}, {"activation_offloading": True}),
        (LLAMA_FACTORY, "use_unsloth_gc", True, {"disable_gradient_checkpointing": True}, {}),
        (UNSLOTH, "use_gradient_checkpointing", False, {}, {"checkpointing": "none"}),
        (UNSLOTH, "bf16", True, {"from_pretrained": "FastModel, line 1"}, {}),
        (UNSLOTH, "bf16", True, {"from_pretrained": "AutoModelForCausalLM, line 1"}, {"training.bf16": True}),
        (AXOLOTL, "batch_size", 8, {"micro_batch_size": 2}, {"training.gradient_accumulation_steps": 4}),
        (AXOLOTL, "batch_size", 8, {"gradient_accumulation_steps": 2}, {}),
        (AXOLOTL, "tokens", {"pad_token": "<p>"}, {}, {"model.special_tokens.pad_token": "<p>"}),
        (TRL, "seq_length", 512, {}, {"data.max_length": 512, "data.overlong": "truncate"}),
        (TRL, "loss_type", "apo_zero", {}, {"preference.loss": "dpo"}),
        (TRL, "loss_type", "dft", {}, {}),
        (TRL, "beta", 0.1, {"loss_type": ["apo_zero"]}, {"preference.beta": 0.1}),
        (TRL, "beta", 0.1, {"loss_type": "dft"}, {}),
        (UNSLOTH, "ORPOTrainer", "line 1", {}, {"preference.loss": "orpo"}),
        (UNSLOTH, "path", "json", {"data_files": "x.jsonl"}, {}),
        (UNSLOTH, "data_files", {"train": "x.jsonl"}, {}, {"data.train.0.path": "x.jsonl"}),
    ],
)
def test_key(table, key, value, others, writes):
    assert dict(outcome(table, key, value, **others).writes) == writes


def test_offloading_to_disk_goes_to_the_host_instead():
    found = outcome(AXOLOTL, "activation_offloading", "disk")
    assert (found.verdict, dict(found.writes)) == ("changed", {"activation_offloading": True})
    assert outcome(AXOLOTL, "activation_offloading", True).verdict == "carried"


@pytest.mark.parametrize("table", [AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH], ids=lambda table: table.name)
@pytest.mark.parametrize("key", ["fsdp", "deepspeed", "neftune_noise_alpha", "label_smoothing_factor"])
def test_what_cannot_be_had_says_why(table, key):
    found = outcome(table, key, "something")
    assert (found.verdict, bool(found.why)) == ("not supported", True)


@pytest.mark.parametrize("table", [AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH], ids=lambda table: table.name)
def test_no_refusal_is_without_a_reason(table):
    others = {"wandb_project": "mine", "adapter": "lora"}
    for key, rule in table.rules.items():
        for value in (True, 1, "x"):
            with contextlib.suppress(UserError):
                found = rule(value, {**others, key: value})
                assert found.why or found.verdict != "not supported", key


def test_four_bits_that_a_script_computes_are_not_guessed():
    with pytest.raises(UserError, match="expected true or false, got wanted"):
        outcome(UNSLOTH, "load_in_4bit", NotLiteral("wanted"), get_peft_model=True)


@pytest.mark.parametrize(
    ("table", "key", "value", "said"),
    [
        (AXOLOTL, "load_in_8bit", True, "8 bits are not made here: without model.quantization, "),
        (AXOLOTL, "load_in_4bit", True, "weights in 4 bits are frozen, and no adapter is trained"),
        (LLAMA_FACTORY, "quantization_bit", 8, "{type: fp8} or {type: nf4}, the base is loaded in 16, "),
        (LLAMA_FACTORY, "quantization_type", "fp4", "fp4: 4 bits are made as nf4 here"),
        (TRL, "bnb_4bit_quant_type", "fp4", "fp4: 4 bits are made as nf4 here"),
        (UNSLOTH, "load_in_8bit", True, "8 bits are not made here"),
        (AXOLOTL, "fp8", True, "by model.quantization: {type: fp8, compute: fp8}"),
        (LLAMA_FACTORY, "fp8", True, "by model.quantization: {type: fp8, compute: fp8}"),
    ],
)
def test_what_is_lost_of_few_bits_is_said(table, key, value, said):
    found = outcome(table, key, value)
    assert found.verdict == "not supported"
    assert said in found.why


@pytest.mark.parametrize(("key", "value"), [("eot_tokens", ["<|im_end|>"]), ("cls_model_config", "Gemma3TextConfig")])
def test_what_is_built_in_is_no_loss(key, value):
    assert outcome(AXOLOTL, key, value).verdict == "no effect here"


@pytest.mark.parametrize("key", ["load_in_4bit", "deepspeed", "early_stopping_patience"])
@pytest.mark.parametrize("value", [None, False, 0])
def test_what_is_off_is_no_loss(key, value):
    assert outcome(AXOLOTL, key, value).verdict == "no effect here"


@pytest.mark.parametrize(
    ("value", "verdict"), [("adamw_bnb_8bit", "carried"), ("muon", "changed"), ("dion", "not supported")]
)
def test_optimizers(value, verdict):
    assert outcome(AXOLOTL, "optimizer", value).verdict == verdict


def test_wrong_values_are_errors():
    with pytest.raises(UserError, match='expected a number, got "fast"'):
        outcome(TRL, "learning_rate", "fast")


def test_names_are_transformers_own():
    assert set(training_arguments._OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(training_arguments._SCHEDULES) <= {name.value for name in SchedulerType}


@pytest.mark.parametrize("table", [LLAMA_FACTORY, TRL], ids=lambda table: table.name)
def test_every_argument_of_training_is_known(table):
    """Both formats take all that TrainingArguments does."""
    assert {field.name for field in dataclasses.fields(TrainingArguments)} - set(table.rules) == set()


def test_names_that_are_carried_exist_and_act():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    written = set()
    for key, rule in training_arguments.TRAINING_ARGUMENTS.items():
        for value in (1, True, "steps", {"a": 1}):
            try:
                written |= {name for name in rule(value, {key: value}).writes if name.startswith("training.")}
            except UserError:
                continue
    carried = {name.removeprefix("training.") for name in written} - set(TrainingSection.model_fields)
    assert carried
    assert carried <= names - set(REFUSED_TRAINING_NAMES)


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "no",
    "x y",
    [],
    [None],
    ["a"],
    {},
    {"a": None},
    [[]],
]


@pytest.mark.parametrize("table", [AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH], ids=lambda table: table.name)
@pytest.mark.parametrize("value", [*ODD, NotLiteral("f()")], ids=repr)
def test_odd_values_are_outcomes_or_errors_of_the_user(table, value, tmp_path):
    for key, rule in table.rules.items():
        for others in ({}, dict.fromkeys(table.rules, value)):
            try:
                found = rule(value, {**others, key: value})
            except UserError:
                continue
            assert isinstance(found, Outcome), key
    for section in table.sections.values():
        for odd in (value, [value], [{"path": value, "type": value, "data_files": value}], {"datasets": value}):
            with contextlib.suppress(UserError):
                section(odd, {"max_samples": value, "dataset_dir": value}, tmp_path / "f")
