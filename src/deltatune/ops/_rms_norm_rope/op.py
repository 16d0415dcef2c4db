"""``deltatune::rms_norm_rope``: the Triton kernels as an op.

One tensor or two (q and k), which then share cos, sin and one launch each way. A result that is not asked
for is an empty tensor.
"""

# B batch, T tokens, N and M heads of q and k, D head dim, R rotary dim, S tokens of all rows, P positions of cos and
# sin (S, or T where one row serves all)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._numerics import unit_stride
from deltatune.ops._opaque import opaque
from deltatune.ops._rms_norm_rope.reference import result_dtype, scaled_dtype

__all__ = ["rms_norm_rope"]


def _stream(x: Tensor) -> Tensor:
    """Rows joined, ``[B, T, ...]`` to ``[S, ...]``; a copy only where strides allow no view."""
    return unit_stride(x.flatten(0, 1))


def _scale(weight: Tensor | None, unit_offset: bool) -> int:
    """What a head is multiplied by: nothing, ``w`` or ``1 + w``."""
    return 0 if weight is None else 2 if unit_offset else 1


def _empty_gradients(
    _q_grad: Tensor, _k_grad: Tensor | None, q: Tensor, k: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    q_weight, k_weight, *_, weight_grad = rest
    weights = (q_weight, None if k is None else k_weight) if weight_grad else (None, None)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, *weights))


@opaque(fake=_empty_gradients, gradient_of="rms_norm_rope", remedy="use impl='reference'")
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
    """The gradients of q and k, and those of the weights where they are wanted.

    A weight's is summed in fp32 in a fixed order: each program over its rows, then over the programs.
    """
    from deltatune.ops._rms_norm_rope import kernel  # Triton, where it runs

    dq, dk, dq_weight, dk_weight = _empty_gradients(q_grad, k_grad, q, k, q_weight, k_weight, weight_grad)
    heads = [(_stream(q_grad), _stream(q), dq, q_weight)]
    if k is not None:
        assert k_grad is not None
        heads.append((_stream(k_grad), _stream(k), dk, k_weight))
    cos, sin = _stream(cos), _stream(sin)
    tiles, rows, pairs = kernel.tiles(q.shape[-1], weight_grad=weight_grad)
    programs = [-(-x.shape[0] * x.shape[1] // (rows * tiles)) for _, x, *_ in heads]
    sums = q.new_empty(sum(programs) if weight_grad else 0, q.shape[-1], dtype=torch.float32)
    if sum(programs):
        (dy, x, _, w), (dy2, x2, *_) = heads[0], heads[-1]
        with torch.cuda.device(q.get_device()):
            kernel.backward_kernel[(sum(programs),)](
                *(heads[0], heads[-1], (cos, sin), sums),
                *(dy.stride()[:2] + x.stride()[:2], dy2.stride()[:2] + x2.stride()[:2], (cos.stride(0), sin.stride(0))),
                *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
                *(_scale(w, unit_offset), weight_grad, tiles, rows, pairs),
                num_warps=kernel.WARPS,
            )
    if weight_grad:
        parts = zip(sums.split_with_sizes(programs), heads, strict=True)
        found = [q.new_empty(0) if w is None else part.sum(0).to(w.dtype) for part, (*_, w) in parts]
        dq_weight, dk_weight = [*found, dk_weight][:2]
    return dq, dk, dq_weight, dk_weight


def _empty_results(q: Tensor, k: Tensor | None, q_weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    _k_weight, cos, *_, unit_offset = rest
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


@opaque(fake=_empty_results, setup_context=_setup_context, backward=_differentiate)
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
    """q ``[B, T, N, D]`` and k ``[B, T, M, D]`` or None, normalised and rotated; ``api`` validates the inputs.

    Where both are given they share a dtype, and so do their weights.
    """
    from deltatune.ops._rms_norm_rope import kernel  # Triton, where it runs

    q_out, k_out = _empty_results(q, k, q_weight, k_weight, cos, unit_offset)
    # alone, q stands in for k too, which then has no programs
    heads = [(_stream(q), q_out, q_weight)]
    if k is not None:
        heads.append((_stream(k), k_out, k_weight))
    cos, sin = _stream(cos), _stream(sin)
    _, rows, pairs = kernel.tiles(q.shape[-1])
    programs = [-(-x.shape[0] * x.shape[1] // rows) for x, *_ in heads]
    if sum(programs):
        (x, _, w), (x2, *_) = heads[0], heads[-1]
        with torch.cuda.device(q.get_device()):
            kernel.forward_kernel[(sum(programs),)](
                *(heads[0], heads[-1], (cos, sin)),
                *(x.stride()[:2], x2.stride()[:2], (cos.stride(0), sin.stride(0))),
                *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
                *(_scale(w, unit_offset), kernel.DTYPES[scaled_dtype(x, w, unit_offset)], rows, pairs),
                num_warps=kernel.WARPS,
                enable_fp_fusion=False,  # a fused multiply-add would skip a rounding of the stock modules
            )
    return q_out, k_out
