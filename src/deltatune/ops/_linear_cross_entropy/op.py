"""``deltatune::linear_cross_entropy``: the loss and its gradients in one call; and the losses token by token.

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

__all__ = ["linear_cross_entropy", "token_losses"]


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
        return (gradient * dloss).to(gradient.dtype)
    return gradient.mul_(dloss)


@opaque(fake=_fake, flops=_flops, setup_context=_setup_context, backward=_differentiate)
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of hidden ``[S, E]``, summed over the tokens that count, and its gradients where they are asked for.

    A gradient that is not is an empty tensor.
    """
    losses, *gradients = _computed(impl, hidden, weight, labels, ignore_index, hidden_grad, weight_grad)
    return losses.sum(), *gradients


def _computed(impl: str, hidden: Tensor, *args: Any) -> Any:
    compute = LinearCrossEntropySpec.load(impl).losses_and_gradients
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        return compute(hidden, *args)


def _fake_token_losses(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, hidden_grad, _weight_grad, _impl = others
    tokens, width = hidden.shape
    losses = hidden.new_empty(tokens, dtype=accumulation_dtype(hidden))
    return losses, hidden.new_empty(tokens if hidden_grad else 0, width)


def _token_losses_flops(hidden_shape: Sequence[int], weight_shape: Sequence[int], *others: Any, **_: object) -> int:
    *_labels, hidden_grad, _weight_grad, _impl = others
    return int(2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * (1 + hidden_grad))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, ctx.ignore_index, ctx.hidden_grad, ctx.weight_grad, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *((hidden, weight, labels) if ctx.weight_grad else ()))


def _differentiate_token_losses(ctx: Any, dlosses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dlosses is None:
        return (None,) * 7
    dhidden, *inputs = ctx.saved_tensors
    return (
        _scaled(dhidden, dlosses.unsqueeze(1)) if ctx.hidden_grad else None,
        token_losses_backward(dlosses, *inputs, ctx.ignore_index, ctx.impl) if ctx.weight_grad else None,
        *(None,) * 5,
    )


def _fake_backward(_dlosses: Tensor, _hidden: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward_flops(
    _dlosses: Sequence[int], hidden_shape: Sequence[int], weight_shape: Sequence[int], *others: Any, **_: object
) -> int:
    """Logits again, twice in blocks, and the product."""
    return int(2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0] * (3 if others[-1] == "triton" else 2))


@opaque(fake=_fake_backward, flops=_backward_flops, gradient_of="linear_cross_entropy")
def token_losses_backward(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, impl: str
) -> Tensor:
    """The gradient of ``weight``, from that of each token's loss ``[S]``, which forward does not know."""
    dweight: Tensor = _computed(impl, hidden, weight, labels, ignore_index, False, True, dlosses)[2]
    return dweight


@opaque(
    fake=_fake_token_losses,
    flops=_token_losses_flops,
    setup_context=_keep_for_backward,
    backward=_differentiate_token_losses,
)
def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """The loss of each token of hidden ``[S, E]``, 0 where it is ignored, and the gradient of hidden of their sum.

    A row of that depends on its own token's loss alone, so backward scales rows. ``weight_grad`` keeps what its
    gradient is computed from.
    """
    del weight_grad  # which is autograd's to know
    losses, dhidden, _ = _computed(impl, hidden, weight, labels, ignore_index, hidden_grad, False)
    return losses, dhidden
