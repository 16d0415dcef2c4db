"""The auxiliary loss of a router as a part of a loss: of every row of a batch, by its share of the targets."""

# B rows, T tokens a row, X experts

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.hf.experts import experts_per_token
from deltatune.layers.exchange import sum_over_ranks
from deltatune.packing.group import SequenceGroup
from deltatune.subclass import stock_class

__all__ = ["coefficient", "router_loss"]

_COEFFICIENTS: Final = ("router_aux_loss_coef", "aux_loss_coef")
#: Of the function that models of transformers share.
_ARGUMENTS: Final = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def router_loss(
    model: Any, output: Any, mask: Tensor | None, shares: Tensor, group: SequenceGroup | None = None
) -> Tensor | None:
    """``coefficient * sum_b shares_b * aux_b``; None for a model that returns no auxiliary loss.

    So four packs in one batch count as four packs one after another, or on four ranks. A model whose function for it is
    not transformers' common one has a single figure for the whole batch.

    Args:
        model: what made ``output``.
        output: of its stock forward.
        mask: 1 for tokens that count ``[B, T]``.
        shares: of all targets, those in a row ``[B]``.
        group: the ranks that hold the pack together: ``aux`` is the pack's, and so is ``output.aux_loss`` then.

    Raises:
        ValueError: with ``group`` a model whose auxiliary loss is not transformers' common one.
    """
    whole = getattr(output, "aux_loss", None)
    if not isinstance(whole, Tensor):
        return None
    function, logits = _function(model), getattr(output, "router_logits", None)
    rows = shares.shape[0]
    if group is not None:
        if function is None or not isinstance(logits, tuple):
            raise ValueError(
                f"{type(model).__name__} has an auxiliary loss of its own, which is not known for a pack that several "
                "ranks hold; set output_router_logits=False"
            )
        top_k = experts_per_token(model.config.get_text_config(), logits[0].shape[-1])
        output.aux_loss = whole = _of_pack(logits, top_k, group)
    if rows > 1 and function is not None and isinstance(logits, tuple):
        top_k = experts_per_token(model.config.get_text_config(), logits[0].shape[-1])
        each = [
            function(
                tuple(of_layer.unflatten(0, (rows, -1))[row] for of_layer in logits),
                logits[0].shape[-1],
                top_k,
                None if mask is None else mask[row],
            )
            for row in range(rows)
        ]
        return coefficient(model) * (torch.stack(each) * shares.to(whole.device)).sum()
    return coefficient(model) * whole * shares.sum().to(whole.device)


def _of_pack(logits: tuple[Tensor, ...], top_k: int, group: SequenceGroup) -> Tensor:
    """``X sum_e f_e p_e``: the share of all tokens and layers that goes to an expert, and its mean probability.

    ``logits``: of each layer, this rank's ``[t, X]``. Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6,
    as transformers' ``load_balancing_loss_func``.
    """
    experts, rows = logits[0].shape[-1], group.size * sum(layer.shape[0] for layer in logits)
    sums = torch.zeros(2, experts, device=logits[0].device)
    for layer in logits:
        probabilities = layer.to(sums.device).softmax(-1)
        chosen = F.one_hot(probabilities.topk(top_k, -1).indices, experts).sum((0, 1))
        sums = sums + torch.stack([chosen.float(), probabilities.float().sum(0)])
    used, probability = sum_over_ranks(sums, group) / rows
    aux: Tensor = experts * (used * probability).sum()
    return aux


def coefficient(model: Any) -> float:
    """The factor that the stock forward reads.

    Raises:
        ValueError: a model that has none.
    """
    owners = (model, model.config.get_text_config())
    found = [getattr(owner, name) for owner in owners for name in _COEFFICIENTS if hasattr(owner, name)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} returns aux_loss, and neither it nor its config has {_COEFFICIENTS[0]} to weigh "
            "it with; leave output_router_logits off"
        )
    return float(found[0])


def _function(model: Any) -> Callable[..., Tensor] | None:
    function: Any = getattr(sys.modules.get(stock_class(model).__module__), "load_balancing_loss_func", None)
    return function if function is not None and [*inspect.signature(function).parameters] == _ARGUMENTS else None
