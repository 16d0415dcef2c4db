"""Unsloth's scripts and notebooks: the arguments of their calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltatune.errors import UserError
from deltatune.importing.batches import batch_of, length_of
from deltatune.importing.groups import EMBEDDINGS, embedding_rate
from deltatune.importing.lora import EIGHT_BITS, NF4, PEFT_TARGETS, QUANTISED, four_bits, targets
from deltatune.importing.preferences import REFERENCE
from deltatune.importing.python_calls import Call, calls_in
from deltatune.importing.rules import Outcome, Rule, Settings, Table, alone, carried, idle, refused
from deltatune.importing.templates import named_template
from deltatune.importing.training_arguments import checkpointing
from deltatune.importing.trl import SFT_CONFIG, overlong, packed
from deltatune.importing.trl_preferences import of_pairs, preference_loss
from deltatune.importing.unsloth_data import LOADED_DATA
from deltatune.importing.values import NotLiteral, count, flag, is_off, number, text, texts, whole

__all__ = ["UNSLOTH", "settings_of_script"]

_MODELS = ("FastLanguageModel", "FastModel", "FastVisionModel", "AutoModelForCausalLM")
# what a call is known as -> the names of its positional arguments, None for objects whose calls are rows of their own
_POSITIONS: dict[str, tuple[str | None, ...]] = {
    "from_pretrained": ("model_name",),
    "get_peft_model": (None, None),
    "LoraConfig": ("r",),
    "SFTTrainer": ("model", "args", "data_collator", "train_dataset", "eval_dataset"),
    "DPOTrainer": ("model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset"),
    "SFTConfig": ("output_dir",),
    "load_dataset": ("path", "name", "data_dir", "data_files"),
    "get_chat_template": (None, "chat_template"),
    "train_on_responses_only": (None, "instruction_part", "response_part"),
}
_ALIASES = {
    "UnslothTrainer": "SFTTrainer",
    "Trainer": "SFTTrainer",
    "DPOTrainer": "SFTTrainer",
    "ORPOTrainer": "SFTTrainer",
    "DPOConfig": "SFTConfig",
    "ORPOConfig": "SFTConfig",
    "TrainingArguments": "SFTConfig",
    "UnslothTrainingArguments": "SFTConfig",
}
_TRAINERS = ("SFTTrainer", *(name for name, kind in _ALIASES.items() if kind == "SFTTrainer"))
# a call that is a row by itself
_SPEAKS = ("from_pretrained", "get_peft_model", "LoraConfig", "train_on_responses_only", "DPOTrainer", "ORPOTrainer")
# what becomes of the model after the run
_SAVES = {
    r"(save_pretrained|save_model|save_lora) \(line .*": idle(
        "a run saves its model and tokenizer in training.output_dir"
    ),
    r"(save_pretrained|push_to_hub)_merged \(line .*": refused(
        "deltatune merge OUTPUT_DIR --output DIR, after the run"
    ),
    r"(save_pretrained|push_to_hub)_gguf \(line .*": refused(
        "deltatune merge RUN --output DIR, afterwards, and llama.cpp's convert_hf_to_gguf.py"
    ),
    r"push_to_hub \(line .*": refused("training.push_to_hub: true pushes each checkpoint and the end of a run"),
}
_FIRST = "a recipe is one run: the first such call is taken"
# what it puts in place of transformers' defaults
_OWN_TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.01,
    "seed": 3407,
    "optim": "adamw_8bit",
    "logging_steps": 1,
}
# with none of which it loads in 4 bits
_OTHER_BITS = ("load_in_8bit", "load_in_16bit", "load_in_fp8", "full_finetuning", "quantization_config")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings_of_script(path: Path, source: str) -> dict[str, Any]:
    """The arguments of the calls that say how a model is trained, by their names.

    Where two calls have an argument of one name, the later one's is taken and the earlier one is kept under
    ``call.argument``. Of calls of one kind the first outside of functions is taken, or the first of all, and the others
    are kept by their lines.

    Raises:
        UserError: broken Python, or no such call.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    seen: set[str] = set()
    calls = [(name, call) for call in calls_in(path, source) if (name := _known(call)) is not None]
    outside = {name for name, call in calls if not call.in_function}
    for name, call in calls:
        helper = call.in_function and name in outside
        if name in seen or helper or (name.endswith("Trainer") and name not in _POSITIONS):
            found[f"{call.name} (line {call.line})"] = NotLiteral(f"{call.name}(...)")
            continue
        seen.add(name)
        for speaks in {name, call.name}.intersection(_SPEAKS):
            found[speaks] = f"{call.owner or speaks}, line {call.line}"
        for key, value in _arguments(call, _POSITIONS.get(call.name, _POSITIONS[name])).items():
            if key == "model":
                if not isinstance(value, str):
                    continue  # the object that from_pretrained gave
                key = "model_name"
            if key in found:
                found[f"{owners.get(key)}.{key}"] = found.pop(key)
            found[key], owners[key] = value, name
    for call in calls_in(path, source):
        row = f"{call.name} (line {call.line})"
        if any(re.fullmatch(pattern, row) for pattern in _SAVES):
            found[row] = NotLiteral(f"{call.owner}.{call.name}(...)")
    if not seen & {"from_pretrained", "SFTTrainer", "SFTConfig"}:
        raise UserError(f"{path}: expected calls of from_pretrained, SFTTrainer or SFTConfig; found none of them")
    return found


def _arguments(call: Call, names: tuple[str | None, ...]) -> dict[str, Any]:
    """Its arguments by name; those beyond the names that are known by their number."""
    beyond = range(len(names) + 1, len(call.positional) + 1)
    every = zip((*names, *(f"{call.name}, argument {number}" for number in beyond)), call.positional, strict=False)
    return {name: given for name, given in every if name} | call.named


def _known(call: Call) -> str | None:
    name = _ALIASES.get(call.name, call.name)
    if (name == "from_pretrained" and call.owner not in _MODELS) or name.startswith("Patch"):
        return None
    return name if name in _POSITIONS or name.endswith("Trainer") else None


def _is_own(settings: Settings) -> bool:
    return str(settings.get("from_pretrained", "")).startswith("Fast")


def _preference(settings: Settings) -> str | None:
    """The loss over pairs of answers, which the trainer tells."""
    if "ORPOTrainer" in settings:
        return "orpo"
    return preference_loss(settings) if "DPOTrainer" in settings else None


def _has_lora(settings: Settings) -> bool:
    return "get_peft_model" in settings or "LoraConfig" in settings


def _batch(value: Any, settings: Settings) -> Outcome:
    keys = ("max_length", "max_seq_length") if _preference(settings) else ("max_seq_length", "max_length")
    return batch_of(*keys, packed=packed, paired=_preference)(value, settings)


def _length(value: Any, settings: Settings) -> Outcome:
    if _preference(settings) and not is_off(settings.get("max_length")):
        return Outcome("no effect here", why="max_length of the trainer bounds its pairs")
    return length_of(overlong)(value, settings)


def _model(value: Any, settings: Settings) -> Outcome:
    name = text(value)
    for end in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        if name.endswith(end):
            ours = name.removesuffix(end)
            # Unsloth's own loader takes that form too, and goes by load_in_4bit
            made = NF4 if _has_lora(settings) and not _is_own(settings) else {}
            return Outcome("changed", {"model.name_or_path": ours, **made}, f"{ours}, its form in 16 bits")
    return Outcome("carried", {"model.name_or_path": name})


@alone
def _dtype(value: Any) -> Outcome:
    if value is None:
        return Outcome("changed", {"model.dtype": "bfloat16"}, "None: bfloat16 where the device has it")
    return Outcome("carried", {"model.dtype": text(value)})


def _autocast(name: str) -> Rule:
    """Unsloth's weights are in 16 bits whatever a script says; those of others may be float32."""

    def rule(value: Any, settings: Settings) -> Outcome:
        if not _is_own(settings):
            return SFT_CONFIG[name](value, settings)
        return Outcome("no effect here", why="in model.dtype, which the weights have")

    return rule


def _full(value: Any, settings: Settings) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    if _has_lora(settings):
        return Outcome("not supported", why="the script adds an adapter as well, which is taken")
    flag(value)
    return Outcome("carried", why="without a section lora every weight trains")


def _part(name: str) -> Rule:
    @alone
    def rule(value: Any) -> Outcome:
        if name == "vision_layers":
            return Outcome("not supported" if value else "no effect here", why="towers of images never train")
        if value is True:
            return Outcome("carried", why="all-linear are those of the text model")
        return Outcome("not supported", why=f"lora.target_modules: names instead of all-linear leave {name} out")

    return rule


def _defaults(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"loss_type": "sigmoid"} if "DPOTrainer" in settings else {}
    own = _is_own(settings)
    if not own and _preference({**found, **settings}):
        found["learning_rate"] = 1e-6
    if own:
        found["dtype"] = None
    if "train_dataset" in settings:
        found |= _OWN_TRAINING if own else {"per_device_train_batch_size": 8}
    if "LoraConfig" in settings:
        found |= {"r": 8, "lora_alpha": 8, "target_modules": PEFT_TARGETS}
    if own and _has_lora(settings):
        found["load_in_4bit"] = all(is_off(settings.get(key)) for key in _OTHER_BITS)
    if own and "get_peft_model" in settings:
        parts = any(key.startswith("finetune_") for key in settings)
        found |= {"r": 16, "lora_alpha": 16, "target_modules": "all-linear" if parts else _TARGETS}
        found["use_gradient_checkpointing"] = "unsloth"
    return found


@alone
def _adapter(value: Any) -> Outcome:
    del value
    return Outcome("carried", {"lora": {}})


@alone
def _responses(value: Any) -> Outcome:
    del value
    return Outcome("carried", {"data.train_on": "assistant"})


def _trains_embeddings(settings: Settings) -> bool:
    named = [settings.get(key) or [] for key in ("modules_to_save", "target_modules")]
    return any(name in str(named) for name in EMBEDDINGS.split("|"))


_RULES: dict[str, Rule] = {
    **SFT_CONFIG,
    **LOADED_DATA,
    "from_pretrained": idle("its arguments are rows of their own"),
    "model_name": _model,
    "pretrained_model_name_or_path": _model,
    "revision": carried("model.revision", text),
    "tokenizer_name": carried("model.tokenizer", text),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "bf16": _autocast("bf16"),
    "fp16": _autocast("fp16"),
    "full_finetuning": _full,
    "attn_implementation": idle("attention over packs is built in"),
    **dict.fromkeys(("quantization_config", "load_in_fp8", "loftq_config", "qat_scheme"), refused(QUANTISED)),
    "load_in_4bit": four_bits(_has_lora),
    "load_in_8bit": refused(EIGHT_BITS),
    **dict.fromkeys(
        (
            "fast_inference",
            "gpu_memory_utilization",
            "max_lora_rank",
            "use_cache",
            "device_map",
            "token",
            "unsloth_tiled_mlp",
            "float8_kv_cache",
            "rope_scaling",
            "local_files_only",
            "offload_embedding",
            "autocast_adapter_dtype",
            "return_logits",
            "disable_log_stats",
            "text_only",
            "load_in_16bit",
            "unsloth_force_compile",
        ),
        idle("no part of what is trained here"),
    ),
    "auto_model": refused("transformers' auto classes find the class"),
    "get_peft_model": _adapter,
    "LoraConfig": _adapter,
    "r": carried("lora.r", count),
    "lora_alpha": carried("lora.lora_alpha", whole),
    "lora_dropout": carried("lora.lora_dropout", number),
    "target_modules": targets,
    "target_parameters": carried("lora.target_parameters", texts),
    "modules_to_save": carried("lora.modules_to_save", texts),
    "exclude_modules": carried("lora.exclude_modules"),
    "layers_to_transform": carried("lora.layers_to_transform"),
    "rank_pattern": carried("lora.rank_pattern"),
    "alpha_pattern": carried("lora.alpha_pattern"),
    "bias": carried("lora.bias", text),
    "use_rslora": carried("lora.use_rslora", flag),
    "use_dora": carried("lora.use_dora", flag, "needs compile.strict: false with compile"),
    "init_lora_weights": carried("lora.init_lora_weights"),
    "task_type": idle("causal language models"),
    "use_gradient_checkpointing": checkpointing,
    "random_state": idle("training.seed seeds the adapter as well"),
    "finetune_vision_layers": _part("vision_layers"),
    "finetune_language_layers": _part("language_layers"),
    "finetune_attention_modules": _part("attention_modules"),
    "finetune_mlp_modules": _part("mlp_modules"),
    "max_seq_length": _length,
    "per_device_train_batch_size": _batch,
    **of_pairs(_preference),
    "DPOTrainer": idle("preferences, by loss_type"),
    "ORPOTrainer": alone(lambda _: Outcome("carried", {"preference.loss": "orpo"})),
    "ref_model": idle(REFERENCE),
    "eval_dataset": refused("made by the script: set data.val_size, or data.eval"),
    "formatting_func": refused("Python of the script: give the rows as messages, or prompt and completion"),
    "data_collator": idle("packs are collated with their boundaries"),
    "compute_metrics": refused("evaluation is the loss per trained token"),
    "callbacks": refused("no callbacks in a recipe"),
    "tokenizer": idle("the checkpoint's"),
    "processing_class": idle("the checkpoint's"),
    "args": idle("its arguments are rows of their own"),
    "peft_config": idle("its arguments are rows of their own"),
    "embedding_learning_rate": embedding_rate(r"modules_to_save\.default\.weight$", _trains_embeddings),
    **dict.fromkeys(
        ("column_names", "skiprows", "delimiter", "download_mode", "cache_dir", "num_proc"),
        idle("files are read as they are; columns go by other names in data.train[].columns"),
    ),
    "streaming": carried("data.streaming", flag),
    "chat_template": alone(named_template),
    "mapping": refused("rows with from and value are read as they are; other keys by data.train[].message_fields"),
    "map_eos_token": idle("the template's own end of a turn is kept"),
    "train_on_responses_only": _responses,
    **dict.fromkeys(("instruction_part", "response_part"), idle("where turns lie is known from the template")),
    "return_function": idle("no part of what is trained here"),
}

UNSLOTH = Table(
    "unsloth",
    _RULES,
    _defaults,
    patterns={
        **_SAVES,
        rf"({'|'.join(_TRAINERS)}) \(line .*": refused(_FIRST),
        r".*Trainer \(line .*": refused("supervised fine-tuning, DPO and ORPO alone"),
        r".*, argument \d+": refused("name the argument"),
        r"load_dataset \(line .*": refused("a further source is an entry of data.train"),
        r"(from_pretrained|get_chat_template|train_on_responses_only|get_peft_model) \(line .*": idle(_FIRST),
        r".* \(line .*": refused(_FIRST),
        r"\*\*.*": refused("arguments that the script computes"),
        r"\w+\.\w+": idle("a later call gives it again, which wins"),
    },
)
