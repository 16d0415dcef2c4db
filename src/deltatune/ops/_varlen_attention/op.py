"""``deltatune::varlen_attention`` and its gradient.

Opaque, because which queries meet which keys depends on where documents begin, which is data: the kernels read it from
the CPU copy, without waiting for a device.
"""

# S tokens of the stream, N query heads, M key heads, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from deltatune.ops._opaque import opaque
from deltatune.ops._varlen_attention import reference, torch_varlen

__all__ = ["varlen_attention"]


def _backward_fake(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _backward_flops(
    _grad: Tensor,
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _o: Tensor,
    _lse: Tensor,
    _cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    _scale: float,
    window: int | None,
    *_: object,
    **__: object,
) -> int:
    """``q k^T`` again, ``do v^T``, ``P^T do``, ``dS k`` and ``dS^T q``: five products."""
    return 10 * q.shape[1] * q.shape[2] * _visible_pairs(q.shape[0], cu_seqlens_cpu, window)


@opaque(fake=_backward_fake, flops=_backward_flops, raw_flops=True, gradient_of="varlen_attention")
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "torch" and q.shape[0]:
        return torch_varlen.backward(grad, q, k, v, o, lse, cu_seqlens, cu_seqlens_cpu, scale, window)
    return reference.backward(grad, q, k, v, o, lse, cu_seqlens_cpu, scale, window)


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _forward_flops(
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    _scale: float,
    window: int | None,
    *_: object,
    **__: object,
) -> int:
    """``q k^T`` and ``P v``: two products of 2 D operations for every pair of a query and a key it sees."""
    return 4 * q.shape[1] * q.shape[2] * _visible_pairs(q.shape[0], cu_seqlens_cpu, window)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor | None, _lse_grad: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


@opaque(fake=_forward_fake, flops=_forward_flops, raw_flops=True, setup_context=_setup_context, backward=_differentiate)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    # reading the last entry is free here, and one too few would leave tokens of the output unwritten
    if int(cu_seqlens_cpu[-1]) != q.shape[0]:
        raise ValueError(
            f"varlen_attention: cu_seqlens must end at the number of tokens: expected B*T = {q.shape[0]}, "
            f"got {int(cu_seqlens_cpu[-1])}; describe padding as a document of its own"
        )
    if impl == "torch" and q.shape[0]:
        return torch_varlen.forward(q, k, v, cu_seqlens, cu_seqlens_cpu, scale, window)
    return reference.forward(q, k, v, cu_seqlens_cpu, scale, window)


def _visible_pairs(tokens: int, cu_seqlens_cpu: Tensor, window: int | None) -> int:
    """Exact from real boundaries; while tracing, where only shapes are known, as if the pack were one document."""
    if isinstance(cu_seqlens_cpu, FakeTensor) or cu_seqlens_cpu.is_meta:
        lengths = torch.tensor([tokens])
    else:
        lengths = cu_seqlens_cpu.diff().long()
    seen = lengths if window is None else lengths.clamp(max=window)
    # the first `seen` queries see 1, 2, ..., seen keys, the rest see `seen` each
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
