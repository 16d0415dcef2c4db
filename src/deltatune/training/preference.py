"""Losses over pairs of answers to one prompt, of which one is preferred: DPO and its kin, ORPO, SimPO."""

# P pairs, D = 2 P documents: a pair's preferred one, then the other; B rows, T tokens a row

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.compile.graphs import of_kind
from deltatune.config.schema import PreferenceSection
from deltatune.hf.model import in_mode
from deltatune.packing.sequences import Sequences

__all__ = ["AnswerLogProbs", "PairLosses", "answer_log_probs", "as_reference", "preference_losses"]


class AnswerLogProbs(NamedTuple):
    """What a model says of each document's answer."""

    sums: Tensor  # fp32 [D], the sum of log p over the answer's tokens
    counts: Tensor  # fp32 [D], these tokens


class PairLosses(NamedTuple):
    """What preferences come to, by pair."""

    losses: Tensor  # fp32 [P]
    chosen_rewards: Tensor  # fp32 [P], without a gradient
    rejected_rewards: Tensor  # fp32 [P], without a gradient


def answer_log_probs(token_losses: Tensor, labels: Tensor, sequences: Sequences, num_documents: int) -> AnswerLogProbs:
    """Sums each document's tokens, from the losses that a prepared model gives of a pack.

    ``sums_d = -sum_{i in d} token_losses_i``, over the tokens that train; without the logits of a pack, a wait for the
    device or a shape that depends on what a pack holds, and always in the same order.

    Args:
        token_losses: fp32 ``[B, T]``, as ``model(..., labels=labels, loss_reduction="none").loss``.
        labels: int64 ``[B, T]``, unshifted, -100 where nothing trains.
        sequences: where the documents lie, on the device of the losses.
        num_documents: D, without padding, which comes last.
    """
    targets = (labels.flatten() != -100) & (sequences.positions != 0)
    sums, counts = (
        # the boundaries are right by construction, and looking at them would wait for the device
        torch.segment_reduce(values, "sum", offsets=sequences.cu_seqlens, initial=0, unsafe=True)[:num_documents]
        for values in (-token_losses.flatten().float(), targets.float())
    )
    return AnswerLogProbs(sums, counts)


def preference_losses(
    policy: AnswerLogProbs, settings: PreferenceSection, reference: Tensor | None = None
) -> PairLosses:
    """The loss of each pair, with rewards ``r`` of its answers and ``m = r_chosen - r_rejected``.

    - ``dpo``: ``-(1 - e) log sigmoid(m) - e log sigmoid(-m)``, ``e`` the label smoothing, where
      ``r = beta (log p - log p_reference)``, summed over the answer's tokens (arXiv 2305.18290)
    - ``hinge``: ``max(0, 1 - m)`` with the same rewards (arXiv 2309.06657)
    - ``ipo``: ``(d - 1 / (2 beta))^2``, ``d`` the difference of the log-ratios per token; the same rewards
      (arXiv 2310.12036, the mean per token as in TRL)
    - ``simpo``: ``-log sigmoid(m - gamma)``, ``r = beta log p`` per token (arXiv 2405.14734)
    - ``orpo``: ``-l_chosen - beta log sigmoid(o_chosen - o_rejected)`` with ``l = log p`` per token and
      ``o = l - log(1 - exp l)``; ``r = beta l`` (arXiv 2403.07691)

    Args:
        policy: of the model that trains.
        settings: the loss and its constants.
        reference: ``sums`` of the reference, fp32 ``[D]``, for the losses that have one.
    """
    scale, means = settings.scale, policy.sums / policy.counts.clamp(min=1)
    if settings.has_reference:
        assert reference is not None, f"{settings.loss} is held against a reference"
        ratios = policy.sums - reference
        rewards = scale * ratios
    else:
        rewards = scale * means
    margins = _difference(rewards)
    if settings.loss == "dpo":
        smoothing = settings.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    elif settings.loss == "hinge":
        losses = torch.relu(1 - margins)
    elif settings.loss == "ipo":
        losses = (_difference(ratios / policy.counts.clamp(min=1)) - 1 / (2 * scale)) ** 2
    elif settings.loss == "simpo":
        losses = -F.logsigmoid(margins - settings.margin)
    else:
        losses = -means[::2] - scale * F.logsigmoid(_difference(_log_odds(means)))
    chosen, rejected = rewards.detach()[::2], rewards.detach()[1::2]
    return PairLosses(losses, chosen, rejected)


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """A PeftModel runs as the model under its adapter inside: in evaluation mode, without gradients.

    Compiled layers have graphs of their own for it. Afterwards adapters, modes and gradients are as they were.
    """
    peft_model: Any = model
    with torch.no_grad(), in_mode(model, training=False), peft_model.disable_adapter(), of_kind("reference"):
        yield


def _difference(values: Tensor) -> Tensor:
    """Chosen less rejected, ``[P]``."""
    return values[::2] - values[1::2]


def _log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))``; of a p that rounds to 1, that of the number before it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))
