"""``deltatune::causal_conv``: the Triton kernels as an op.

Opaque, because the compiler's own kernel reads x once for every tap, and cannot write the parts where they are wanted.
"""

# B batch, T tokens, D channels, W width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deltatune.ops._opaque import opaque

__all__ = ["causal_conv"]


def _backward_fake(
    _grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    _positions: Tensor,
    _split: Sequence[int],
    _l2norm: Sequence[int],
    _silu: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape[0] if weight_grad else 0, weight.shape[1]),
        (weight if bias is None else bias).new_empty(weight.shape[0] if bias_grad else 0),
    )


def _backward_flops(
    _grad_shapes: Sequence[Sequence[int] | None],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias_shape: Sequence[int] | None,
    _positions_shape: Sequence[int],
    _split: Sequence[int],
    _l2norm: Sequence[int],
    _silu: bool,
    weight_grad: bool,
    *_: object,
    **__: object,
) -> int:
    """The sum again, the gradient of x, and that of the weight where it is wanted."""
    return _flops(x_shape, weight_shape) * (2 + weight_grad)


@opaque(fake=_backward_fake, flops=_backward_flops, gradient_of="causal_conv", remedy="use impl='reference'")
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
    from deltatune.ops._causal_conv import launch  # Triton, where it runs

    wanted = {"weight_grad": weight_grad, "bias_grad": bias_grad}
    dx, dweight, dbias = launch.backward(grads, x, weight, bias, positions, split, l2norm, silu, **wanted)
    return (
        dx,
        weight.new_empty(0, weight.shape[1]) if dweight is None else dweight,
        (weight if bias is None else bias).new_empty(0) if dbias is None else dbias,
    )


def _fake(
    x: Tensor,
    _weight: Tensor,
    _bias: Tensor | None,
    _positions: Tensor,
    split: Sequence[int],
    _l2norm: Sequence[int],
    _silu: bool,
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


@opaque(fake=_fake, flops=_flops, setup_context=_setup_context, backward=_differentiate)
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
) -> list[Tensor]:
    """The parts ``[B, T, split[i]]``; inputs are validated by ``api``."""
    from deltatune.ops._causal_conv import launch  # Triton, where it runs

    return launch.forward(x, weight, bias, positions, split, l2norm, silu)
