"""When Axolotl evaluates, saves and stops."""

from __future__ import annotations

from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings, other
from deltatune.importing.values import count, flag, is_off, number, text, whole

__all__ = ["every", "patience", "per_epoch", "samples", "strategy"]


def _cannot_evaluate(kind: str, settings: Settings) -> Outcome | None:
    held_out = any(not is_off(settings.get(key)) for key in ("val_set_size", "test_datasets"))
    return None if kind == "save" or held_out else Outcome("no effect here", why="there is no held-out data")


def per_epoch(kind: str) -> Rule:
    """Evaluations or saves in an epoch."""

    def rule(value: Any, settings: Settings) -> Outcome:
        nothing = _cannot_evaluate(kind, settings)
        if nothing is not None:
            return nothing
        if is_off(value):
            return Outcome("carried", {f"training.{kind}_strategy": "no"} if value is not None else {})
        times, limited = count(value), not is_off(settings.get("max_steps"))
        strategy, share = f"training.{kind}_strategy", 1 / (times * (other(settings, "num_epochs", number, 1) or 1))
        if times == 1 and not limited:
            return Outcome("carried", {strategy: "epoch"}, "once an epoch")
        if share >= 1:
            return Outcome("changed", {strategy: "epoch"}, "at the end of an epoch, which max_steps may not reach")
        return Outcome(
            "changed", {strategy: "steps", f"training.{kind}_steps": share}, "a share of all steps, as there"
        )

    return rule


def strategy(kind: str) -> Rule:
    """When to evaluate or save, unless steps say it."""

    def rule(value: Any, settings: Settings) -> Outcome:
        nothing = _cannot_evaluate(kind, settings)
        if nothing is not None:
            return nothing
        for winner in (f"{kind}s_per_epoch", f"{kind}_steps"):
            if not is_off(settings.get(winner)):
                return Outcome("no effect here", why=f"{winner} is given, which wins")
        return Outcome("carried", {f"training.{kind}_strategy": text(value)})

    return rule


def every(kind: str) -> Rule:
    """Steps between evaluations or saves."""

    def rule(value: Any, settings: Settings) -> Outcome:
        nothing = _cannot_evaluate(kind, settings)
        if is_off(value) or nothing is not None:
            return nothing or Outcome("no effect here", why="not set")
        if not is_off(settings.get(f"{kind}s_per_epoch")):
            return Outcome("no effect here", why=f"{kind}s_per_epoch is given, which wins")
        found = number(value)
        every = found if found < 1 else whole(value)
        return Outcome("carried", {f"training.{kind}_strategy": "steps", f"training.{kind}_steps": every})

    return rule


def patience(value: Any, settings: Settings) -> Outcome:
    """Evaluations without a better loss after which the run ends."""
    nothing = _cannot_evaluate("eval", settings)
    if is_off(value) or nothing is not None:
        return nothing or Outcome("no effect here", why="not set")
    why = "training.load_best_model_at_end saves the best weights, not the last"
    return Outcome("carried", {"training.early_stopping_patience": count(value)}, why)


def samples(value: Any, settings: Settings) -> Outcome:
    """Completions of held-out rows at evaluations."""
    nothing = _cannot_evaluate("eval", settings)
    if is_off(value) or nothing is not None:
        return nothing or Outcome("no effect here", why="off there too")
    flag(value)
    writes = {
        "samples.held_out": other(settings, "num_generation_samples", lambda value: count(value or 3)),
        "samples.max_new_tokens": other(settings, "generation_max_new_tokens", lambda value: count(value or 50)),
    }
    return Outcome("changed", writes, "greedy, at each evaluation, into samples.jsonl")
