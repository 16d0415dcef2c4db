"""TRL's losses over pairs of answers, and the keys that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deltatune.importing.preferences import REFERENCE, belongs_to, loss_of
from deltatune.importing.rules import Outcome, Rule, Settings, idle, refused

__all__ = ["loss_type", "of_pairs", "preference_loss"]

_PREFERENCE_LOSSES = {"sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}
#: Losses of trl.SFTConfig.
_OF_TEXT = (None, "nll", "chunked_nll", "dft")
#: Keys of trl.DPOConfig that trl.SFTConfig does not have.
_OF_PREFERENCES = ("beta", "precompute_ref_log_probs", "f_divergence_type", "max_prompt_length", "rpo_alpha")

_OF_REFERENCE = ("precompute_ref_log_probs", "precompute_ref_batch_size", "ref_model_init_kwargs")
_LENGTHS = ("max_prompt_length", "max_completion_length")
_TERMS = (
    *("rpo_alpha", "ld_alpha", "loss_weights", "use_weighting"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "reference_free", "force_use_ref_model"),
)


def preference_loss(settings: Settings) -> str | None:
    """The loss over pairs of answers that the settings ask for: nothing but its own keys says so."""
    loss = settings.get("loss_type")
    name = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if name is None and any(key in settings for key in _OF_PREFERENCES):
        name = "sigmoid"
    # one that is not here is over pairs all the same
    return None if name in _OF_TEXT else _PREFERENCE_LOSSES.get(str(name), "dpo")


def loss_type(value: Any, settings: Settings) -> Outcome:
    """Cross entropy, or a loss over pairs; of others over pairs the commonest takes the place."""
    del settings
    if value in ("nll", "chunked_nll", None):
        return Outcome("no effect here", why="the loss is cross entropy, without whole logits")
    if value == "dft":
        return Outcome("not supported", why="the loss is cross entropy")
    outcome = loss_of(_PREFERENCE_LOSSES, "sigmoid, hinge and ipo alone on pairs: the recipe takes sigmoid's")(value)
    return replace(outcome, writes={"preference.loss": "dpo"}) if outcome.verdict == "not supported" else outcome


def of_pairs(asked: Callable[[Settings], str | None]) -> dict[str, Rule]:
    """The keys of trl.DPOConfig and trl.ORPOConfig.

    Args:
        asked: of all settings, the loss over pairs that they ask for.
    """

    def beta(value: Any, settings: Settings) -> Outcome:
        outcome = belongs_to("beta", asked)(value, settings)
        if outcome.writes and asked(settings) != "orpo":
            return replace(outcome, why="of DPO; ORPO has such a key too: then set preference.loss: orpo")
        return outcome

    return {
        "beta": beta,
        "label_smoothing": idle("losses robust and exo_pair alone read it"),
        "generate_during_eval": refused("use the section samples"),
        "disable_dropout": idle("the reference runs without dropout; set lora.lora_dropout"),
        **dict.fromkeys(_OF_REFERENCE, idle(REFERENCE)),
        **dict.fromkeys(_LENGTHS, refused("data.max_length bounds prompt and answer together")),
        **dict.fromkeys(_TERMS, refused("preferences have one loss, without further terms")),
    }
