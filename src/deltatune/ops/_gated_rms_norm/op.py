"""``deltatune::gated_rms_norm``: the Triton kernels as an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._opaque import opaque

__all__ = ["gated_rms_norm"]

_REMEDY = "use impl='reference'"


def _heads(x: Tensor) -> Tensor:
    """``[..., N, D]`` to ``[S, N, D]``; a copy only where strides allow no view."""
    return x.view(1, 1, -1) if x.ndim == 1 else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def _backward_fake(
    _grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, _eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if weight_grad else 0)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


@opaque(fake=_backward_fake, gradient_of="gated_rms_norm", remedy=_REMEDY)
def gated_rms_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and gate, and that of weight where it is wanted."""
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    with torch.cuda.device(x.get_device()):
        dx, dgate, dweight = kernel.backward(_heads(grad), _heads(x), _heads(gate), weight, eps, weight_grad)
    return dx.view(x.shape), dgate.view(x.shape), x.new_empty(0) if dweight is None else dweight


def _fake(x: Tensor, _gate: Tensor, _weight: Tensor, _eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads = gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, wanted[2])
    return *(x if needed else None for x, needed in zip(grads, wanted, strict=True)), None


@opaque(fake=_fake, setup_context=_setup_context, backward=_differentiate)
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Calls the kernel; ``api`` validates the inputs."""
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    with torch.cuda.device(x.get_device()):
        return kernel.forward(_heads(x), _heads(gate), weight, eps).view(x.shape)
