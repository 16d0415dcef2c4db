"""``deltatune::linear_cross_entropy``: schema, kernel, fake, autograd and FLOP formula of the reference.

Opaque, because the loop over chunks would otherwise be unrolled into the graph and fused across chunks.
"""

# S tokens, E width of hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._linear_cross_entropy import reference

__all__ = ["summed_loss"]

torch.library.define(
    "deltatune::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, bool hidden_grad, bool weight_grad) "
    "-> (Tensor, Tensor, Tensor)",
)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The loss of hidden ``[S, E]``, summed over the tokens that count; inputs are validated by ``api``."""
    recording = torch.is_grad_enabled()
    loss: Tensor = torch.ops.deltatune.linear_cross_entropy(
        hidden, weight, labels, ignore_index, recording and hidden.requires_grad, recording and weight.requires_grad
    )[0]
    return loss


def _kernel(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(hidden):
        return reference.loss_and_gradients(hidden, weight, labels, ignore_index, hidden_grad, weight_grad)


def _fake(
    hidden: Tensor, weight: Tensor, _labels: Tensor, _ignore_index: int, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    width = hidden.shape[1]
    return (
        hidden.new_empty((), dtype=loss_dtype),
        hidden.new_empty(hidden.shape[0] if hidden_grad else 0, width),
        weight.new_empty(weight.shape[0] if weight_grad else 0, width),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    # zeros in place of the two absent gradients would be as large as the gradients themselves
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)
    ctx.computed = inputs[4:]


def _differentiate(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 6
    gradients = (
        gradient * dloss.to(gradient.dtype) if computed else None
        for gradient, computed in zip(ctx.saved_tensors, ctx.computed, strict=True)
    )
    return (*gradients, None, None, None, None)


torch.library.impl("deltatune::linear_cross_entropy", "CompositeExplicitAutograd", _kernel)
torch.library.register_fake("deltatune::linear_cross_entropy", _fake)
torch.library.register_autograd("deltatune::linear_cross_entropy", _differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.deltatune.linear_cross_entropy)
def _flops(
    hidden_shape: Sequence[int],
    weight_shape: Sequence[int],
    _labels_shape: Sequence[int],
    _ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    *_: object,
    **__: object,
) -> int:
    """One product for the logits, one for each gradient."""
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * (1 + hidden_grad + weight_grad)
