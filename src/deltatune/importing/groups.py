"""Groups of parameters: learning rates of their own, and what trains of a model."""

from __future__ import annotations

import re
from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings, alone, other
from deltatune.importing.values import is_off, mapping, number, text, texts

__all__ = ["EMBEDDINGS", "embedding_rate", "learning_rate_groups", "lora_plus", "muon", "unfrozen"]

EMBEDDINGS = "embed_tokens|lm_head"
_RATES = "training.learning_rates"


def lora_plus(name: str) -> Rule:
    """LoRA+'s ratio, and the rate of embeddings beside it."""

    def rule(value: Any, settings: Settings) -> Outcome:
        if value is None:
            return Outcome("no effect here", why="not set")
        if is_off(settings.get("loraplus_lr_ratio")):
            return Outcome("no effect here", why="loraplus_lr_ratio is not set")
        return Outcome("carried", {f"training.{name}": number(value)})

    return rule


def embedding_rate(pattern: str, trains: Any, *, scale: bool = False) -> Rule:
    """The learning rate of embeddings, or what it is times ``learning_rate``, where they train."""

    def rule(value: Any, settings: Settings) -> Outcome:
        if is_off(value):
            return Outcome("no effect here", why="not set")
        if not trains(settings):
            return Outcome("no effect here", why="embeddings and head do not train")
        rate = number(value) * other(settings, "learning_rate", number) if scale else number(value)
        return Outcome("changed", {f"{_RATES}.{pattern}": rate}, "their weight decay is that of others")

    return rule


@alone
def learning_rate_groups(value: Any) -> Outcome:
    """Axolotl's ``lr_groups``: parts of names, and a rate for all that hold one."""
    if is_off(value):
        return Outcome("no effect here", why="not set")
    writes = {}
    for group in value if isinstance(value, list) else [value]:
        parts = texts(mapping(group).get("modules"))
        writes[f"{_RATES}.{'|'.join(map(re.escape, parts))}"] = number(group.get("lr"))
    return Outcome("carried", writes, "a name that two groups match is an error")


@alone
def unfrozen(value: Any) -> Outcome:
    """Axolotl's expressions: they begin where a name begins, and a point stands for itself.

    It escapes all points, those that are escaped already as well, and such an expression then fits no name.
    """
    if is_off(value):
        return Outcome("no effect here", why="not set")
    patterns = [text(value)] if isinstance(value, str) else texts(value)
    if rows := [pattern for pattern in patterns if re.search(r"\[\d*:?\d*\]$", pattern)]:
        return Outcome("not supported", why=f"{rows[0]}: a parameter trains whole, not some of its rows")
    if escaped := [pattern for pattern in patterns if r"\." in pattern]:
        why = "points are escaped once more there, so this matches no name; write it without the backslashes"
        return Outcome("not supported", why=f"{escaped[0]}: {why}")
    ours = ["^" + re.sub(r"\.(?!\+)", r"\\.", pattern.removeprefix("^")) for pattern in patterns]
    return Outcome("changed", {"training.unfrozen_parameters": ours}, "the same names, as ours reads expressions")


@alone
def muon(value: Any) -> Outcome:
    """A switch, or a name, for Muon."""
    if is_off(value):
        return Outcome("no effect here", why="off there too")
    return Outcome("changed", {"training.optim": "muon"}, "torch's, with steps scaled to AdamW's learning rate")
