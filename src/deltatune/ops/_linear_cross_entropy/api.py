"""The output head and its cross-entropy in one: documentation, validation and choice."""

# E width of hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._autocast import autocast
from deltatune.ops._choice import Candidate, Choice, choose
from deltatune.ops._linear_cross_entropy import torch_chunked
from deltatune.ops._linear_cross_entropy.op import summed_loss
from deltatune.ops._linear_cross_entropy.reference import check_targets
from deltatune.ops._validation import check_floating, check_same_device

__all__ = ["choose_linear_cross_entropy", "linear_cross_entropy"]


def choose_linear_cross_entropy(device: torch.device | str, dtype: torch.dtype, *, impl: str = "auto") -> Choice:
    """The implementation that ``linear_cross_entropy`` takes for inputs of this kind, and why.

    Raises:
        ValueError: ``impl`` is unknown or cannot run here.
    """
    del device  # both implementations run on every device
    refusal = torch_chunked.missing()
    rounds = torch_chunked.rounds_loss(dtype)
    why = "torch's own rounds the summed loss to the 16-bit dtype of its input" if rounds else refusal or ""
    own = Candidate("reference", why)
    theirs = Candidate("torch", "torch's own chunked function", refusal)
    first, second = (own, theirs) if rounds else (theirs, own)
    return choose("linear_cross_entropy", impl, (first, second))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, labels)`` that never holds the logits of the pack.

    ``loss = -sum_i log softmax(weight hidden_i)[labels_i]`` over the tokens whose label is not ``ignore_index``. Labels
    are taken as they are: shifting them is the caller's business.

    Args:
        hidden: ``[..., E]``.
        weight: ``[V, E]``, the head.
        labels: ``[...]`` integers, in ``[0, V)`` or ``ignore_index``.
        ignore_index: the label of a token that counts for nothing.
        reduction: ``"sum"``, 0 where no label counts; or ``"mean"`` over the tokens that count, NaN where none does, as
            in ``torch.nn.functional.cross_entropy``.
        impl: ``"torch"``: ``torch.nn.functional.linear_cross_entropy``, torch 2.13 or newer, whose loss is summed and
            rounded in the dtype of ``hidden`` before it is widened: up to 0.8% off in bf16. ``"reference"``: anywhere,
            logits and loss in fp32. ``"auto"``: torch's for fp32 and fp64, otherwise the reference.

    Returns:
        An fp32 scalar (fp64 for fp64).

    Gradients are those of first order and are computed together with the loss, chunk by chunk: what is kept for
    backward is the gradient of ``hidden`` and that of ``weight``, where they are needed. A frozen ``weight`` costs no
    matrix product for a gradient, and ``torch.no_grad()`` none at all. Under autocast ``hidden`` and ``weight`` are
    cast to its dtype first.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown reduction, an ``impl`` that cannot
            run here, or (on the CPU) a label outside the vocabulary.
    """
    hidden, weight = autocast(hidden, weight)
    _validate(hidden, weight, labels, reduction)
    choice = choose_linear_cross_entropy(hidden.device, hidden.dtype, impl=impl)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if choice.impl == "torch":
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_targets(targets[targets != ignore_index], weight.shape[0])
        loss = torch_chunked.loss(rows, weight, targets, ignore_index)
        loss = loss.float() if torch_chunked.rounds_loss(loss.dtype) else loss
    else:
        loss = summed_loss(rows, weight, targets, ignore_index)
    return loss if reduction == "sum" else loss / (targets != ignore_index).sum()


def _validate(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> None:
    op = "linear_cross_entropy"
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{op}: expected hidden [..., E], weight [V, E], labels [...]; got hidden {list(hidden.shape)}, "
            f"weight {list(weight.shape)}, labels {list(labels.shape)}"
        )
    check_floating(op, hidden=hidden)
    check_same_device(op, hidden=hidden, weight=weight, labels=labels)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{op}: hidden and weight must share a dtype, got {hidden.dtype} and {weight.dtype}; cast one")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{op}: labels must be integers, got {labels.dtype}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'mean', got {reduction!r}")
