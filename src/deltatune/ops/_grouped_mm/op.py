"""``deltatune::grouped_mm`` and the gradient of its weight. Opaque, because the rows of a group are data."""

# R rows, G groups, K input width, N output width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._opaque import opaque

__all__ = ["grouped_mm"]


def _weight_gradient_fake(grad: Tensor, x: Tensor, offsets: Tensor, _impl: str) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _weight_gradient_flops(grad_shape: Sequence[int], x_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]


@opaque(fake=_weight_gradient_fake, flops=_weight_gradient_flops, gradient_of="grouped_mm", remedy="freeze its weight")
def grouped_mm_weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor, impl: str) -> Tensor:
    """``[G, N, K]``."""
    dweight: Tensor = GroupedMmSpec.load(impl).weight_gradient(grad, x, offsets)
    return dweight


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, offsets, ctx.impl = inputs
    x_trains, weight_trains = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_trains else None, weight if x_trains else None, offsets)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    # dx = dy @ weight is the same product with the matrices transposed
    dx = None if weight is None else torch.ops.deltatune.grouped_mm(grad, weight.mT, offsets, ctx.impl)
    dweight = None if x is None else grouped_mm_weight_gradient(grad, x, offsets, ctx.impl)
    return dx, dweight, None, None


@opaque(fake=_fake, flops=_flops, setup_context=_setup_context, backward=_differentiate)
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, impl: str) -> Tensor:
    """``[R, N]`` for x ``[R, K]`` and weight ``[G, N, K]``; ``api`` validates inputs and chooses ``impl``."""
    y: Tensor = GroupedMmSpec.load(impl).forward(x, weight, offsets)
    return y
