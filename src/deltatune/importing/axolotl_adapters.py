"""Axolotl's keys of adapters."""

from __future__ import annotations

from typing import Any

from deltatune.importing.groups import EMBEDDINGS, lora_plus
from deltatune.importing.lora import NF4, new_adapter, targets, with_lora
from deltatune.importing.rules import Outcome, Rule, Settings, alone, carried, idle
from deltatune.importing.values import count, flag, is_off, mapping, number, text, texts, whole

__all__ = ["ADAPTERS", "has_lora", "trains_embeddings"]


def has_lora(settings: Settings) -> bool:
    """Whether an adapter is asked for."""
    return settings.get("adapter") in ("lora", "qlora")


@alone
def _adapter(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="every weight trains")
    if value == "qlora":
        return Outcome("carried", {"lora": {}, **NF4}, "lora over a base in 4 bits")
    if value != "lora":
        return Outcome("not supported", why="lora is the one adapter of recipes")
    return Outcome("carried", {"lora": {}})


@alone
def _linear(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    return Outcome("carried", {"lora.target_modules": "all-linear"})


def _targets(value: Any, settings: Settings) -> Outcome:
    if not is_off(settings.get("lora_target_linear")):
        beyond = [name for name in ("embed_tokens", "lm_head") if value and name in texts(value)]
        if beyond:
            return Outcome(
                "not supported", why=f"all-linear leaves out {' and '.join(beyond)}: use lora.modules_to_save"
            )
        return Outcome("no effect here", why="lora_target_linear takes all linear layers")
    return targets(value, settings)


def trains_embeddings(settings: Settings) -> bool:
    """Whether embeddings or the head train: with every weight, or by name."""
    named = [settings.get(key) or [] for key in ("lora_modules_to_save", "lora_target_modules")]
    return not has_lora(settings) or any(name in str(named) for name in EMBEDDINGS.split("|"))


@alone
def _share_of_experts(value: Any) -> Outcome:
    if is_off(value):
        return Outcome("no effect here", why="not set")
    names = texts(value)
    full = all(any(name.endswith(end) for name in names) for end in ("gate_up_proj", "down_proj"))
    return Outcome("carried", {"lora.target_parameters": "all-experts" if full else names})


_LORA: dict[str, Rule] = {
    "lora_r": carried("lora.r", count),
    "lora_alpha": carried("lora.lora_alpha", whole),
    "lora_dropout": carried("lora.lora_dropout", number),
    "lora_target_modules": _targets,
    "lora_target_linear": _linear,
    "lora_target_parameters": _share_of_experts,
    "lora_modules_to_save": carried("lora.modules_to_save", texts),
    "lora_rank_pattern": carried("lora.rank_pattern", mapping),
    "lora_alpha_pattern": carried("lora.alpha_pattern", mapping),
    "lora_fan_in_fan_out": idle("linear layers alone get adapters"),
    "peft_use_rslora": carried("lora.use_rslora", flag),
    "peft_use_dora": carried("lora.use_dora", flag, "needs compile.strict: false with compile"),
    "peft_init_lora_weights": carried("lora.init_lora_weights"),
    "peft_layers_to_transform": carried("lora.layers_to_transform"),
}

ADAPTERS: dict[str, Rule] = {
    "adapter": _adapter,
    **{key: with_lora(new_adapter("lora_model_dir", key, rule), has_lora) for key, rule in _LORA.items()},
    "lora_model_dir": with_lora(carried("lora.name_or_path", text, "its ranks and targets are its own"), has_lora),
    "loraplus_lr_ratio": with_lora(lora_plus("loraplus_lr_ratio"), has_lora),
    "loraplus_lr_embedding": with_lora(lora_plus("loraplus_lr_embedding"), has_lora),
}
