"""Rows in a batch and tokens in a row: the size of a pack."""

from __future__ import annotations

from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings, other
from deltatune.importing.values import count, is_off

__all__ = ["accumulated", "batch_of", "length_of"]


def batch_of(*length_keys: str, packed: Any, paired: Any) -> Rule:
    """Rows in a batch times the most tokens in a row, twice where a row is a pair: the tokens of a pack.

    Args:
        length_keys: where the most tokens in a row stand; the first that is set.
        packed: of all settings, whether rows are packs there too.
        paired: of all settings, whether a row is a pair of answers.
    """

    def rule(value: Any, settings: Settings) -> Outcome:
        length_key = next((key for key in length_keys if not is_off(settings.get(key))), None)
        if is_off(value) or length_key is None:
            why = f"without {length_keys[0]} nothing bounds a batch: set packing.tokens_per_batch"
            return Outcome("not supported", why=why)
        rows, tokens, answers = count(value), other(settings, length_key, count), 2 if paired(settings) else 1
        why = f"{rows} x {'2 x ' if answers == 2 else ''}{tokens} tokens ({length_key}) a pack"
        if not packed(settings):
            why += "; rows were padded there: a pack holds more documents, so an epoch has fewer, larger steps"
        return Outcome("changed", {"packing.tokens_per_batch": rows * answers * tokens}, why)

    return rule


def accumulated(value: Any, settings: Settings) -> Outcome:
    """Axolotl's rows in a step, which are batches of ``micro_batch_size``, unless their number is given."""
    if is_off(value):
        return Outcome("no effect here", why="not set")
    if not is_off(settings.get("gradient_accumulation_steps")):
        return Outcome("no effect here", why="gradient_accumulation_steps is given, which wins")
    rows = other(settings, "micro_batch_size", count, 1)
    writes = {"training.gradient_accumulation_steps": max(1, count(value) // rows)}
    return Outcome("changed", writes, f"{value} rows in a step, {rows} in a batch")


def length_of(overlong: Any) -> Rule:
    """The most tokens of a document, and what becomes of longer ones.

    Args:
        overlong: of all settings, the value of data.overlong.
    """

    def rule(value: Any, settings: Settings) -> Outcome:
        if is_off(value):
            return Outcome("no effect here", why="not set: a document must fit a pack")
        fate = overlong(settings)
        writes = {"data.max_length": count(value), "data.overlong": fate}
        return Outcome("changed", writes, f"the most tokens of a document; longer ones: {fate}, as there")

    return rule
