"""The output head and its cross-entropy in one: documentation, validation and choice."""

# E width of hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._linear_cross_entropy import torch_chunked
from deltatune.ops._linear_cross_entropy.op import linear_cross_entropy as loss_and_gradients
from deltatune.ops._linear_cross_entropy.op import token_losses
from deltatune.ops._linear_cross_entropy.providers import LinearCrossEntropySpec
from deltatune.ops._linear_cross_entropy.reference import check_targets
from deltatune.ops._numerics import autocast
from deltatune.ops._opaque import first_order
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_floating, check_same_device

__all__ = ["linear_cross_entropy"]


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
        reduction: ``"sum"``, 0 where no label counts; ``"mean"`` over the tokens that count, NaN where none does, as
            in ``torch.nn.functional.cross_entropy``; or ``"none"``: each token's own loss ``[...]``, 0 where the label
            does not count.
        impl: ``"triton"``: bf16 and fp16 with E a multiple of 8 on NVIDIA GPUs of compute capability 9.0 or newer; an
            online softmax over blocks of the vocabulary, whose logits stay in registers. ``"torch"``:
            ``torch.nn.functional.linear_cross_entropy``, torch 2.13 or newer, whose loss is summed and rounded in the
            dtype of ``hidden`` before it is widened: up to 0.8% off in bf16. ``"reference"``: anywhere, a chunk of
            tokens at a time. ``"auto"``: Triton's where it can run, torch's for fp32 and fp64, otherwise the reference.

    Returns:
        fp32 (fp64 for fp64), a scalar or ``[...]``. But for torch's own, logits, softmax and sums are fp32 (fp64 for
        fp64). Results are as reproducible as torch's matrix products: nothing else adds up in an order that may change.

    Gradients are those of first order and are computed together with the loss: what is kept for backward is the
    gradient of ``hidden`` and that of ``weight``, where they are needed, and backward scales them in place unless the
    graph is retained. A frozen ``weight`` costs no matrix product for a gradient, and ``torch.no_grad()`` none at all.
    Under ``"none"`` the gradient of ``weight`` is computed in backward, which knows what each loss counts, from logits
    that are computed again.
    Under autocast ``hidden`` and ``weight`` are cast to its dtype first. What ignored tokens hold reaches nothing, NaN
    included.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown reduction, an ``impl`` that cannot
            run here, or (on the CPU) a label outside the vocabulary. On a GPU such a label fails an assertion on the
            device, which ends the process: reading labels would wait for it.
    """
    hidden, weight = autocast(hidden, weight)
    _validate(hidden, weight, labels, reduction)
    choice = choose(LinearCrossEntropySpec(hidden.device, hidden.dtype, hidden.shape[-1]), impl)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if choice.impl == "torch":
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_targets(targets[targets != ignore_index], weight.shape[0])
        loss = torch_chunked.loss(rows, weight, targets, ignore_index, "none" if reduction == "none" else "sum")
    else:
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (rows, weight)]
        compute = token_losses if reduction == "none" else loss_and_gradients
        loss = compute(rows, weight, targets, ignore_index, *wanted, choice.impl)[0]
    loss = first_order("linear_cross_entropy", loss, rows, weight)
    if reduction == "none":
        return loss.view(labels.shape)
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
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"{op}: reduction must be 'sum', 'mean' or 'none', got {reduction!r}")
