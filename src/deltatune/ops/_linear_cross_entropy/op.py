"""``deltatune::linear_cross_entropy``: the loss and its gradients in one call.

Opaque, because the loop over chunks would otherwise be unrolled into the graph and fused across chunks.
"""

# S tokens, E width of hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._linear_cross_entropy.providers import LinearCrossEntropySpec
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque

__all__ = ["linear_cross_entropy"]


def _fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, hidden_grad, weight_grad, _ = others
    width = hidden.shape[1]
    return (
        hidden.new_empty((), dtype=accumulation_dtype(hidden)),
        hidden.new_empty(hidden.shape[0] if hidden_grad else 0, width),
        weight.new_empty(weight.shape[0] if weight_grad else 0, width),
    )


def _flops(hidden_shape: Sequence[int], weight_shape: Sequence[int], *others: Any, **_: object) -> int:
    """One product for the logits, one for each gradient; in blocks, logits again for the weight's."""
    *_labels, hidden_grad, weight_grad, impl = others
    products = 1 + hidden_grad + weight_grad * (2 if impl == "triton" else 1)
    return int(2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * products)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    # zeros in place of the two absent gradients would be as large as the gradients themselves
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)
    ctx.computed = inputs[4:6]


def _differentiate(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 7
    gradients = (
        _scaled(gradient, dloss.to(gradient.dtype)) if computed else None
        for gradient, computed in zip(ctx.saved_tensors, ctx.computed, strict=True)
    )
    return (*gradients, None, None, None, None, None)


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    """In place where nothing reads it again: a second copy would be the most memory the whole op takes.

    ``retain_graph`` and ``create_graph`` keep what forward saved. A traced backward, whose tensors are subclasses,
    leaves the choice to the compiler.
    """
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * dloss
    return gradient.mul_(dloss)


@opaque(fake=_fake, flops=_flops, setup_context=_setup_context, backward=_differentiate)
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of hidden ``[S, E]``, summed over the tokens that count, and its gradients where they are asked for.

    A gradient that is not is an empty tensor.
    """
    compute = LinearCrossEntropySpec.load(impl).loss_and_gradients
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        results: tuple[Tensor, Tensor, Tensor] = compute(hidden, weight, labels, ignore_index, hidden_grad, weight_grad)
    return results
