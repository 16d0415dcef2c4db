"""``y = x W^T + s (x A^T) B^T`` for linear layers that share their input, adapters as part of the products.

With ``u = x cat(s A)^T``, one narrow product for all layers, and ``t = dy (s B)``::

    y = u B^T + x W^T      dx = t A + dy W      dA = t^T x      dB = dy^T u

The wide product adds to the narrow one in its epilogue, forward and backward.
"""

# M tokens, K input width, N output width, R rank, W columns of u (all adapters, those of a layer in whole 16s)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._lora_linear.gradients import gradients
from deltatune.ops._lora_linear.op import lora_accumulate
from deltatune.ops._lora_linear.operands import forward_operands, parts
from deltatune.ops._opaque import first_order_backward

__all__ = ["Adapter", "arguments", "check_scales", "linear_with_lora", "low_rank", "noted_scales"]


class Adapter(NamedTuple):
    """``A [R, K]``, ``B [N, R]`` and what their product is multiplied with."""

    down: Tensor
    up: Tensor
    scale: float


def linear_with_lora(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]) -> list[Tensor]:
    """``x W_i^T + sum_j s_ij (x A_ij^T) B_ij^T`` of every layer i.

    Args:
        x: ``[..., K]``, in the dtype of the weights.
        weights: ``W [N, K]`` of every layer, frozen: they get no gradient. None at all: the low-rank products alone.
        adapters: of every layer, one at least; in any floating dtype, cast to that of ``x`` for the products.

    Returns:
        ``[..., N_i]`` of each layer. Sums are fp32 inside a product (fp64 for fp64); ``u`` and ``t`` are rounded to the
        dtype of ``x``; gradients of A and B are fp32 sums cast to the dtypes of A and B.

    Saved for backward: ``x``, ``u``, and the weights, A and B themselves, so that torch refuses a backward after one of
    them was written to. Backward is of first order. Source: Hu et al., LoRA (2021).
    """
    outputs = _apply(x.reshape(-1, x.shape[-1]), *arguments(weights, adapters))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def arguments(weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]) -> tuple[Any, ...]:
    """What a Function that saves all of it takes: numbers of adapters, scales, and W, A and B as they are now."""
    down, up, scales = zip(*(adapter for of_layer in adapters for adapter in of_layer), strict=True)
    # a view keeps the storage of this call where a tool gives the Parameter another (``.data = ...``) before backward
    views = [tensor.view_as(tensor) for tensor in (*down, *up)]
    return tuple(map(len, adapters)), scales, *[weight.detach() for weight in weights], *views


def low_rank(x: Tensor, adapter: Adapter) -> Tensor:
    """``s (x A^T) B^T`` in the dtype of ``x``, as ``linear_with_lora`` without a weight."""
    return linear_with_lora(x, (), [[adapter]])[0]


def noted_scales(scales: Sequence[float]) -> Tensor | None:
    """What a forward scaled with, to be saved with its products: a checkpoint that recomputes these saves it anew."""
    return None if torch.compiler.is_compiling() else torch.tensor(scales, dtype=torch.float64, device="cpu")


def check_scales(op: str, noted: Tensor | None, scales: Sequence[float]) -> None:
    """Whether the products that backward has are those of the forward it belongs to.

    Raises:
        RuntimeError: they were recomputed at other scales.
    """
    if type(noted) is Tensor and noted.tolist() != list(scales):
        raise RuntimeError(
            f"{op}: the scale of an adapter was changed between a forward and its recomputation in backward, from "
            f"{list(scales)} to {noted.tolist()}; change it after backward"
        )


class _LinearWithLora(torch.autograd.Function):
    # Dynamo takes a forward with as many parameters as arguments for one without ctx; there are always more arguments.
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        counts, scales, *tensors = rest
        weights, down, up = parts(tensors, len(scales))
        across, columns, offsets = forward_operands(x.dtype, counts, scales, down, up)
        narrow = x @ across
        ctx.counts, ctx.scales = counts, scales
        ctx.save_for_backward(noted_scales(scales), x, narrow, *tensors)
        outputs = []
        for weight, b, at in zip(weights or (None,) * len(counts), columns, offsets, strict=True):
            u = narrow[:, at : at + b.shape[1]]
            outputs.append(u @ b.mT if weight is None else lora_accumulate(u, b.mT, [x], [weight.mT]))
        return tuple(outputs)

    @staticmethod
    @first_order_backward("linear_with_lora", remedy="detach its input and its adapters")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        noted, x, narrow, *tensors = ctx.saved_tensors
        check_scales("linear_with_lora", noted, ctx.scales)
        x_trains, _, _, *train = ctx.needs_input_grad
        dx, of_tensors = gradients(grads, x, narrow, tensors, ctx.counts, ctx.scales, (x_trains, *train))
        return dx, None, None, *of_tensors


_apply: Callable[..., tuple[Tensor, ...]] = _LinearWithLora.apply
