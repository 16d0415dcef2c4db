"""``deltatune::causal_conv``: the Triton kernels as an op.

Opaque, because the compiler's own kernel reads x once for every tap, and cannot write the parts where they are wanted.
"""

# B batch, T tokens, D channels, W width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._causal_conv import launch
from deltatune.ops._numerics import unit_stride
from deltatune.ops._opaque import opaque

__all__ = ["causal_conv"]


def _stream(x: Tensor) -> Tensor:
    """``[B, T, D]`` to ``[N, D]`` with channels side by side: a view wherever the rows are evenly spaced."""
    return unit_stride(x.flatten(0, 1))


def _empty_gradients(
    _grads: Sequence[Tensor | None], x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, weight_grad, bias_grad = options
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape[0] if weight_grad else 0, weight.shape[1]),
        (weight if bias is None else bias).new_empty(weight.shape[0] if bias_grad else 0),
    )


def _backward_flops(_grads: object, x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **_: Any) -> int:
    """The sum again, the gradient of x, and that of the weight where it is wanted."""
    *_inputs, weight_grad, _bias_grad = rest
    return _flops(x_shape, weight_shape) * (2 + bool(weight_grad))


@opaque(fake=_empty_gradients, flops=_backward_flops, gradient_of="causal_conv", remedy="use impl='reference'")
def causal_conv_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, these two empty where they are not wanted: a frozen convolution computes neither."""
    from deltatune.ops._causal_conv.kernel import backward_kernel  # Triton, where it runs

    dx, dweight, dbias = _empty_gradients(grads, x, weight, bias, weight_grad, bias_grad)
    stream, width = _stream(x), weight.shape[1]
    planes = width * weight_grad + bias_grad
    tile = launch.WEIGHT_GRAD if planes else launch.BACKWARD_HEADS if any(l2norm) else launch.BACKWARD
    # a gradient that is missing is one row of zeros, read again for every token
    given = [
        x.new_zeros(size).expand(len(stream), size) if grad is None else _stream(grad.to(x.dtype))
        for grad, size in zip(grads, split, strict=True)
    ]
    sums = x.new_empty(-(-len(stream) // tile.rows), planes, x.shape[-1], dtype=torch.float32) if planes else None
    launch.Parts.of(tuple(split), tuple(l2norm)).launch(
        *(backward_kernel, tile, stream, weight, bias, positions),
        *(tuple(given), tuple(y.stride(0) for y in given), dx, sums),
        options=(silu, weight_grad, bias_grad),
    )
    if sums is not None:
        totals = sums.sum(0)  # in a fixed order, as each program added its own: the same bits every time
        if weight_grad:
            dweight = totals[:width].T.to(weight.dtype).contiguous()
        if bias_grad:
            dbias = totals[-1].to(dbias.dtype, copy=True)
    return dx, dweight, dbias


def _empty_parts(
    x: Tensor, _weight: Tensor, _bias: Tensor | None, _positions: Tensor, split: Sequence[int], *_: object
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in split]


def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    """A multiply-add for every tap of every output."""
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * weight_shape[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    del output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grads: Sequence[Tensor | None] | None) -> tuple[Tensor | None, ...]:
    if grads is None or all(grad is None for grad in grads):
        return (None,) * 7
    needs = ctx.needs_input_grad
    found = causal_conv_backward(grads, *ctx.saved_tensors, *ctx.options, needs[1], needs[2])
    wanted = (x if needed else None for x, needed in zip(found, needs, strict=False))
    return (*wanted, None, None, None, None)


@opaque(fake=_empty_parts, flops=_flops, setup_context=_setup_context, backward=_differentiate)
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
) -> list[Tensor]:
    """The parts, each contiguous ``[B, T, split[i]]``; inputs are validated by ``api``."""
    from deltatune.ops._causal_conv.kernel import forward_kernel  # Triton, where it runs

    parts = _empty_parts(x, weight, bias, positions, split)
    tile = launch.FORWARD_HEADS if any(l2norm) else launch.FORWARD
    launch.Parts.of(tuple(split), tuple(l2norm)).launch(
        *(forward_kernel, tile, _stream(x), weight, bias, positions, tuple(parts)), options=(silu,)
    )
    return parts
