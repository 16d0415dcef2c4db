"""The gated activation of two sums that are never written, and its gradient: both opaque to the compiler.

``act(G + u_g B_g^T) * (U + u_u B_u^T)``, where G and U are base products. The kernels are ours on a GPU in 16 bits;
elsewhere plain torch computes the same.
"""

# M tokens, N outputs of gate and of up, W columns of one layer's u and B

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._lora_gated.reference import activated, activation_backward
from deltatune.ops._numerics import accumulation_dtype, unit_stride
from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._opaque import opaque

__all__ = ["lora_gated_activation", "lora_gated_activation_backward"]


def _fake(gate: Tensor, *_: object) -> Tensor:
    return gate.new_empty(gate.shape)


def _flops(gate_shape: Sequence[int], _up: object, narrow_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * gate_shape[0] * gate_shape[1] * narrow_shape[1]


@opaque(fake=_fake, flops=_flops, gradient_of="lora_gated")
def lora_gated_activation(
    gate: Tensor, up: Tensor, narrow: Tensor, gate_b: Tensor, up_b: Tensor, activation: str
) -> Tensor:
    """``[M, N]`` of ``gate`` and ``up`` ``[M, N]``, ``narrow [M, W_g + W_u]``, ``gate_b [N, W_g]``, ``up_b [N, W_u]``.

    Sums and activation are computed in fp32 (fp64 for fp64); the result is rounded once.
    """
    if not _in_kernels(gate):
        of_gate, of_up = _sums(gate, up, narrow, gate_b, up_b)
        return (activated(of_gate, activation) * of_up).to(gate.dtype)
    from deltatune.ops._lora_gated import kernel  # Triton, where it runs

    h = _fake(gate)
    if h.numel():
        inputs = _dense(gate, up, narrow, gate_b, up_b)
        with torch.cuda.device(gate.get_device()):
            kernel.forward(inputs, h, gelu=activation != "silu")
    return h


def _backward_fake(_grad: Tensor, gate: Tensor, *_: object) -> list[Tensor]:
    return [gate.new_empty(gate.shape), gate.new_empty(gate.shape)]


def _backward_flops(_grad: object, *shapes: Sequence[int], **__: object) -> int:
    return _flops(*shapes)


@opaque(fake=_backward_fake, flops=_backward_flops, gradient_of="lora_gated")
def lora_gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, narrow: Tensor, gate_b: Tensor, up_b: Tensor, activation: str
) -> list[Tensor]:
    """The gradients to both sums, ``[M, N]`` each, from ``grad [M, N]``, the gradient of the result."""
    if not _in_kernels(gate):
        of_gate, of_up = _sums(gate, up, narrow, gate_b, up_b)
        wide = grad.to(of_gate.dtype)
        found = activation_backward(wide * of_up, of_gate, activation), wide * activated(of_gate, activation)
        return [x.to(gate.dtype) for x in found]
    from deltatune.ops._lora_gated import kernel  # Triton, where it runs

    grads = _backward_fake(grad, gate)
    if gate.numel():
        inputs = _dense(gate, up, narrow, gate_b, up_b)
        with torch.cuda.device(gate.get_device()):
            kernel.backward(unit_stride(grad), inputs, grads, gelu=activation != "silu")
    return grads


def _in_kernels(gate: Tensor) -> bool:
    return gate.dtype in (torch.bfloat16, torch.float16) and triton_refusal(gate.device, gate.dtype) is None


def _dense(*inputs: Tensor) -> list[Tensor]:
    return [unit_stride(x) for x in inputs]


def _sums(gate: Tensor, up: Tensor, narrow: Tensor, gate_b: Tensor, up_b: Tensor) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(gate)
    of_gate, of_up = torch.split(narrow.to(wide), [gate_b.shape[1], up_b.shape[1]], dim=1)
    return gate.to(wide) + of_gate @ gate_b.to(wide).mT, up.to(wide) + of_up @ up_b.to(wide).mT
