"""``deltatune::gated_rms_norm``: the Triton kernels as an op."""

# S tokens, N heads, D the dim that is normalised

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._numerics import unit_stride
from deltatune.ops._opaque import opaque

__all__ = ["gated_rms_norm"]


def _heads(x: Tensor) -> Tensor:
    """``[..., N, D]`` to ``[S, N, D]``; a copy only where strides allow no view."""
    heads = x.view(1, 1, -1) if x.ndim == 1 else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
    return unit_stride(heads)


def _empty_gradients(
    _grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, _eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape if weight_grad else 0)


@opaque(fake=_empty_gradients, gradient_of="gated_rms_norm", remedy="use impl='reference'")
def gated_rms_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and gate, and that of weight where it is wanted.

    The latter is summed in fp32 in a fixed order: each program over its rows, then over the programs.
    """
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    dx, dgate, dweight = _empty_gradients(grad, x, gate, weight, eps, weight_grad)
    grad, x, gate = _heads(grad), _heads(x), _heads(gate)
    num_rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    (rows, width), tiles = kernel.tile(dim), kernel.TILES if weight_grad else 1
    programs = -(-num_rows // (rows * tiles)) if x.numel() else 0
    sums = x.new_empty(programs if weight_grad else 0, dim, dtype=torch.float32)
    if programs:
        with torch.cuda.device(x.get_device()):
            kernel.backward_kernel[(programs,)](
                *(grad, x, gate, weight, dx, dgate, sums, grad.stride()[:2], x.stride()[:2], gate.stride()[:2]),
                *(num_rows, x.shape[1], dim, eps, weight_grad, tiles, rows, width),
                num_warps=kernel.WARPS,
            )
    return dx, dgate, sums.sum(0).to(weight.dtype) if weight_grad else dweight


def _empty_result(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads = gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, wanted[2])
    return *(x if needed else None for x, needed in zip(grads, wanted, strict=True)), None


@opaque(fake=_empty_result, setup_context=_setup_context, backward=_differentiate)
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like ``x``, contiguous; ``api`` validates the inputs."""
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    y = _empty_result(x)
    x, gate = _heads(x), _heads(gate)
    num_rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    rows, width = kernel.tile(dim)
    if y.numel():
        scaled = kernel.DTYPES[torch.promote_types(x.dtype, weight.dtype)]
        with torch.cuda.device(x.get_device()):
            kernel.forward_kernel[(-(-num_rows // rows),)](
                *(x, gate, weight, y, x.stride()[:2], gate.stride()[:2]),
                *(num_rows, x.shape[1], dim, eps, scaled, rows, width),
                num_warps=kernel.WARPS,
            )
    return y
