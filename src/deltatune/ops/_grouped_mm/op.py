"""``deltatune::grouped_mm``: schema, kernels, fake, autograd and FLOP formulas.

Opaque, because the rows of a group are data.
"""

# R rows, G groups, K input width, N output width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._grouped_mm import reference, torch_grouped

__all__ = ["multiply"]


class _Implementation(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


_IMPLEMENTATIONS = {
    "torch": _Implementation(torch_grouped.forward, torch_grouped.weight_gradient),
    "reference": _Implementation(reference.forward, reference.weight_gradient),
}

torch.library.define("deltatune::grouped_mm", "(Tensor x, Tensor weight, Tensor offsets, str impl) -> Tensor")
torch.library.define(
    "deltatune::grouped_mm_weight_gradient", "(Tensor grad, Tensor x, Tensor offsets, str impl) -> Tensor"
)


def multiply(x: Tensor, weight: Tensor, offsets: Tensor, impl: str) -> Tensor:
    """``[R, N]`` for x ``[R, K]`` and weight ``[G, N, K]``; ``api`` validates inputs and chooses ``impl``."""
    y: Tensor = torch.ops.deltatune.grouped_mm(x, weight, offsets, impl)
    return y


def _forward(x: Tensor, weight: Tensor, offsets: Tensor, impl: str) -> Tensor:
    with without_autocast(x):
        return _IMPLEMENTATIONS[impl].forward(x, weight, offsets)


def _weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor, impl: str) -> Tensor:
    with without_autocast(x):
        return _IMPLEMENTATIONS[impl].weight_gradient(grad, x, offsets)


def _forward_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _weight_gradient_fake(grad: Tensor, x: Tensor, offsets: Tensor, _impl: str) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], **_: object) -> None:
    x, weight, offsets, ctx.impl = inputs
    x_trains, weight_trains = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_trains else None, weight if x_trains else None, offsets)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    # dx = dy @ weight is the same product with the matrices transposed
    dx = None if weight is None else torch.ops.deltatune.grouped_mm(grad, weight.mT, offsets, ctx.impl)
    dweight = None if x is None else torch.ops.deltatune.grouped_mm_weight_gradient(grad, x, offsets, ctx.impl)
    return dx, dweight, None, None


def _refuse_double_backward(_ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "grouped_mm has no second derivative to its weight; call backward() without create_graph=True, or freeze it"
    )


torch.library.impl("deltatune::grouped_mm", "CompositeExplicitAutograd", _forward)
torch.library.impl("deltatune::grouped_mm_weight_gradient", "CompositeExplicitAutograd", _weight_gradient)
torch.library.register_fake("deltatune::grouped_mm", _forward_fake)
torch.library.register_fake("deltatune::grouped_mm_weight_gradient", _weight_gradient_fake)
torch.library.register_autograd("deltatune::grouped_mm", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("deltatune::grouped_mm_weight_gradient", _refuse_double_backward)


@register_flop_formula(torch.ops.deltatune.grouped_mm)
def _forward_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[1]


@register_flop_formula(torch.ops.deltatune.grouped_mm_weight_gradient)
def _weight_gradient_flops(grad_shape: Sequence[int], x_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]
