"""Adapters: what the four projects' LoRA settings become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings, alone, refused
from deltatune.importing.values import flag, is_off, texts

__all__ = [
    "EIGHT_BITS",
    "NF4",
    "PEFT_TARGETS",
    "PRODUCTS_IN_FP8",
    "QUANTISED",
    "bits_of_bitsandbytes",
    "four_bits",
    "kind_of_four_bits",
    "new_adapter",
    "targets",
    "with_lora",
]

QUANTISED = (
    "not made here: without model.quantization, {type: nf4} or {type: fp8}, the base is loaded in 16 bits, which takes "
    "more memory"
)
EIGHT_BITS = (
    "bitsandbytes' 8 bits are not made here: without model.quantization, {type: fp8} or {type: nf4}, the base is "
    "loaded in 16, which takes more memory"
)
PRODUCTS_IN_FP8 = (
    "weights that train are in 16 bits or more; products with a frozen base are computed in fp8 by "
    "model.quantization: {type: fp8, compute: fp8}"
)
#: What the base is made into as it is read.
NF4: Mapping[str, Any] = {"model.quantization.type": "nf4"}
_NESTED = "made as it is read, its scales in 8 bits, as double quantisation has them"
#: What PEFT adapts in most families where no target is given.
PEFT_TARGETS = ["q_proj", "v_proj"]
_WHOLE_MODULES = ("embed_tokens", "lm_head")
_ALL = ("all", "all-linear", "all_linear")


def with_lora(rule: Rule, has_lora: Any) -> Rule:
    """A rule of a section that is there only where the file asks for an adapter.

    Args:
        rule: what becomes of the key then.
        has_lora: of all settings, whether they ask for one.
    """

    def outcome(value: Any, settings: Settings) -> Outcome:
        return rule(value, settings) if has_lora(settings) else Outcome("no effect here", why="no adapter is trained")

    return outcome


def four_bits(has_lora: Callable[[Settings], bool]) -> Rule:
    """A rule of a flag that has bitsandbytes hold the base in 4 bits.

    Args:
        has_lora: of all settings, whether they ask for an adapter.
    """

    def outcome(value: Any, settings: Settings) -> Outcome:
        if is_off(value) or not flag(value):
            return Outcome("no effect here", why="not set" if value is None else "off there too")
        if not has_lora(settings):
            return Outcome("not supported", why="weights in 4 bits are frozen, and no adapter is trained")
        return Outcome("carried", NF4, _NESTED)

    return outcome


def bits_of_bitsandbytes(has_lora: Callable[[Settings], bool], method: str) -> Rule:
    """A rule of the number of bits that the base is held in.

    Args:
        has_lora: of all settings, whether they ask for an adapter.
        method: the key of who makes them, bitsandbytes by default.
    """
    four = four_bits(has_lora)

    def outcome(value: Any, settings: Settings) -> Outcome:
        by_it = str(settings.get(method, "bnb")).lower() in ("bnb", "bitsandbytes")
        if str(value) == "4" and by_it:
            return four(True, settings)
        return refused(EIGHT_BITS if str(value) == "8" and by_it else QUANTISED)(value, settings)

    return outcome


@alone
def kind_of_four_bits(value: Any) -> Outcome:
    """Which of bitsandbytes' two formats of 4 bits."""
    if is_off(value) or value == "nf4":
        return Outcome("no effect here", why="not set" if is_off(value) else "what 4 bits are here")
    return Outcome("not supported", why=f"{value}: 4 bits are made as nf4 here")


def new_adapter(source: str, key: str, rule: Rule) -> Rule:
    """A rule for a new adapter; one that training goes on from, which ``source`` names, says it itself.

    Args:
        source: the project's key for such an adapter.
        key: the key of the rule; dropout is the recipe's in any case.
        rule: what becomes of the key of a new adapter.
    """

    def outcome(value: Any, settings: Settings) -> Outcome:
        if is_off(settings.get(source)) or key == "lora_dropout":
            return rule(value, settings)
        return Outcome("no effect here", why=f"the adapter of {source} says it")

    return outcome


@alone
def targets(value: Any) -> Outcome:
    """Modules that get adapters: names, ``all``, or one expression; whole modules among them are trained fully."""
    if is_off(value):
        return Outcome("no effect here", why="not set")
    if isinstance(value, str) and (any(sign in value for sign in r"\([*|^$") or value in _ALL):
        return Outcome("carried", {"lora.target_modules": "all-linear" if value in _ALL else value})
    names = texts(value)
    if names[0] in _ALL:
        return Outcome("carried", {"lora.target_modules": "all-linear"})
    whole = [name for name in names if name in _WHOLE_MODULES]
    adapted = [name for name in names if name not in whole]
    if not whole or not adapted:
        return Outcome("carried", {"lora.target_modules": names})
    writes = {"lora.target_modules": adapted, "lora.modules_to_save": whole}
    return Outcome("changed", writes, f"{' and '.join(whole)} train fully and are saved with the adapter")
