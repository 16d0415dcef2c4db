"""``deltatune::rms_norm_rope``: the Triton kernels as an op.

One tensor or two (q and k), which then share cos, sin and one launch each way. A result that is not asked
for is an empty tensor.
"""

# B batch, T tokens, N and M heads of q and k, D head dim, R rotary dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._opaque import opaque
from deltatune.ops._rms_norm_rope.reference import result_dtype

__all__ = ["rms_norm_rope"]


def _stream(x: Tensor | None) -> Any:
    """Rows joined, ``[B, T, ...]`` to ``[B * T, ...]``; a copy only where strides allow no view."""
    return None if x is None else x.flatten(0, 1)


def _like(x: Tensor | None, shape_of: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None or shape_of is None else x.view(shape_of.shape)


def _backward_fake(
    _q_grad: Tensor,
    _k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    _cos: Tensor,
    _sin: Tensor,
    _eps: float,
    _unit_offset: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk = q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)
    weights = (weight if weight_grad and x is not None else None for x, weight in ((q, q_weight), (k, k_weight)))
    dq_weight, dk_weight = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights)
    return dq, dk, dq_weight, dk_weight


@opaque(fake=_backward_fake, gradient_of="rms_norm_rope", remedy="use impl='reference'")
def rms_norm_rope_backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q and k, and those of the weights where they are wanted."""
    from deltatune.ops._rms_norm_rope import launch  # Triton, where it runs

    grads, inputs = (_stream(q_grad), _stream(k_grad)), (_stream(q), _stream(k))
    angles = (_stream(cos), _stream(sin))
    with torch.cuda.device(q.get_device()):
        dq, dk, dq_weight, dk_weight = launch.backward(
            *grads, *inputs, q_weight, k_weight, *angles, eps, unit_offset, weight_grad
        )
    return dq.view(q.shape), _like(dk, k, q), _like(dq_weight, q_weight, q), _like(dk_weight, k_weight, q)


def _fake(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    _k_weight: Tensor | None,
    cos: Tensor,
    _sin: Tensor,
    _eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(q, q_weight, cos, unit_offset)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(0) if k is None else k.new_empty(k.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    if inputs[1] is None:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    # asked for once: under checkpointing a second look is an error
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
    grads = rms_norm_rope_backward(q_grad, None if saved[1] is None else k_grad, *saved, *ctx.options, any(wanted[2:]))
    return *(grad if needed else None for grad, needed in zip(grads, wanted, strict=True)), *(None,) * 4


@opaque(fake=_fake, setup_context=_setup_context, backward=_differentiate)
def rms_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Calls the kernel for q ``[B, T, N, D]`` and k ``[B, T, M, D]`` or None; ``api`` validates the inputs.

    Where both are given they share a dtype, and so do their weights.
    """
    from deltatune.ops._rms_norm_rope import launch  # Triton, where it runs

    with torch.cuda.device(q.get_device()):
        q_out, k_out = launch.forward(
            _stream(q), _stream(k), q_weight, k_weight, _stream(cos), _stream(sin), eps, unit_offset
        )
    return q_out.view(q.shape), _like(k_out, k, q)
