"""``deltatune::gated_rms_norm``: the Triton kernels as an op, with fake, gradient and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["gated_rms_norm"]

torch.library.define("deltatune::gated_rms_norm", "(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor")
torch.library.define(
    "deltatune::gated_rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor gate, Tensor weight, float eps, bool weight_grad) -> (Tensor, Tensor, Tensor)",
)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Calls the op; ``api`` validates the inputs."""
    y: Tensor = torch.ops.deltatune.gated_rms_norm(x, gate, weight, eps)
    return y


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    with torch.cuda.device(x.get_device()):
        return kernel.forward(_heads(x), _heads(gate), weight, eps).view(x.shape)


def _backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from deltatune.ops._gated_rms_norm import kernel  # Triton, where it runs

    with torch.cuda.device(x.get_device()):
        dx, dgate, dweight = kernel.backward(_heads(grad), _heads(x), _heads(gate), weight, eps, weight_grad)
    return dx.view(x.shape), dgate.view(x.shape), x.new_empty(0) if dweight is None else dweight


def _heads(x: Tensor) -> Tensor:
    """``[..., N, D]`` to ``[S, N, D]``; a copy only where strides allow no view."""
    return x.view(1, 1, -1) if x.ndim == 1 else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def _forward_fake(x: Tensor, _gate: Tensor, _weight: Tensor, _eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    _grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, _eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if weight_grad else 0)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads = torch.ops.deltatune.gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, wanted[2])
    return *(x if needed else None for x, needed in zip(grads, wanted, strict=True)), None


def _refuse_double_backward(_ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "gated_rms_norm with impl='triton' has no second derivative; call backward() without create_graph=True, "
        "or use impl='reference'"
    )


torch.library.impl("deltatune::gated_rms_norm", "CompositeExplicitAutograd", _forward)
torch.library.impl("deltatune::gated_rms_norm_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("deltatune::gated_rms_norm", _forward_fake)
torch.library.register_fake("deltatune::gated_rms_norm_backward", _backward_fake)
torch.library.register_autograd("deltatune::gated_rms_norm", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("deltatune::gated_rms_norm_backward", _refuse_double_backward)


# As torch's own counter: matrix products alone. Its time is bytes, and recomputing it counts as free.
@register_flop_formula([torch.ops.deltatune.gated_rms_norm, torch.ops.deltatune.gated_rms_norm_backward])
def _flops(*_: object, **__: object) -> int:
    return 0
