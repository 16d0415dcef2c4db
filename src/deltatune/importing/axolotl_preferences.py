"""Axolotl's keys of preference training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deltatune.importing.preferences import REFERENCE, belongs_to, loss_of
from deltatune.importing.rules import Outcome, Rule, Settings, idle, refused

__all__ = ["PREFERENCES", "RL", "preference_loss"]

RL = "supervised fine-tuning and dpo, ipo, orpo, simpo alone: no reward models, no reinforcement learning"
_LOSSES = ("dpo", "ipo", "orpo", "simpo")  # by the same names here


def preference_loss(settings: Settings) -> str | None:
    """The loss over pairs that the file asks for, of those that there are here."""
    loss = settings.get("rl")
    return loss if isinstance(loss, str) and loss in _LOSSES else None


def _loss(value: Any, settings: Settings) -> Outcome:
    outcome = loss_of({name: name for name in _LOSSES}, RL)(value)
    if value == "simpo" and settings.get("cpo_alpha") is None:
        return replace(outcome, verdict="changed", why="without the likelihood of the chosen answer (cpo_alpha: 0)")
    return outcome


PREFERENCES: dict[str, Rule] = {
    "rl": _loss,
    **dict.fromkeys(("rl_beta", "dpo_beta"), belongs_to("beta", preference_loss)),
    "orpo_alpha": belongs_to("beta", preference_loss, "orpo"),
    "simpo_gamma": belongs_to("gamma", preference_loss, "simpo"),
    "dpo_label_smoothing": belongs_to("label_smoothing", preference_loss, "dpo"),
    "cpo_alpha": refused("simpo without the likelihood of the chosen answer"),
    "rpo_alpha": refused("dpo without the likelihood of the chosen answer"),
    **dict.fromkeys(("precompute_ref_log_probs", "rl_adapter_ref_model"), idle(REFERENCE)),
}
