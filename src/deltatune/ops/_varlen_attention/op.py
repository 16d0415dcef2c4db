"""``deltatune::varlen_attention`` and its gradient.

Opaque, because which queries meet which keys depends on where documents begin, which is data: the kernels read it from
the CPU copy, without waiting for a device.
"""

# S tokens of the stream, N query heads, M key heads, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque
from deltatune.ops._varlen_attention import reference, torch_varlen
from deltatune.ops._varlen_attention.pairs import Pairs

__all__ = ["varlen_attention"]


def _backward_fake(
    _grad: Tensor, _lse_grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _o, _lse, sinks, *_ = rest
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, sinks))


def _backward_flops(
    _grad: Tensor, _lse_grad: Tensor | None, q: Tensor, k: Tensor, _v: Tensor, *rest: Any, **_: object
) -> int:
    """``q k^T`` again, ``do v^T``, ``P^T do``, ``dS k`` and ``dS^T q``: five products."""
    _o, _lse, _sinks, *pairs, _impl = rest
    return 10 * q.shape[1] * q.shape[2] * Pairs(*pairs).visible(q.shape[0], k.shape[0])


def _backward_workspace(_grad: Tensor, _lse_grad: Tensor | None, q: Tensor, k: Tensor, *rest: object) -> int:
    return torch_varlen.backward_workspace(q, k) if rest[-1] == "torch" else 0


@opaque(
    fake=_backward_fake,
    flops=_backward_flops,
    raw_flops=True,
    workspace=_backward_workspace,
    gradient_of="varlen_attention",
)
def varlen_attention_backward(
    grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    kv_cu_seqlens_cpu: Tensor | None,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks, the last one ``[0]`` without any."""
    dsinks = q.new_empty(0) if sinks is None else reference.sink_gradient(grad, o, lse, lse_grad, sinks)
    pairs = Pairs(cu_seqlens, cu_seqlens_cpu, kv_cu_seqlens_cpu, scale, window)
    if impl == "torch" and q.shape[0]:
        return *torch_varlen.backward(grad, lse_grad, q, k, v, o, lse, pairs), dsinks
    return *reference.backward(grad, lse_grad, q, k, v, o, lse, pairs), dsinks


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))


def _forward_flops(q: Tensor, k: Tensor, _v: Tensor, _sinks: Tensor | None, *rest: Any, **_: object) -> int:
    """``q k^T`` and ``P v``: two products of 2 D operations for every pair of a query and a key it sees."""
    *pairs, _impl = rest
    return 4 * q.shape[1] * q.shape[2] * Pairs(*pairs).visible(q.shape[0], k.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and lse_grad is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[3]) if grad is None else grad
    grads = varlen_attention_backward(grad, lse_grad, *saved, *ctx.options)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None,) * 6)


@opaque(fake=_forward_fake, flops=_forward_flops, raw_flops=True, setup_context=_setup_context, backward=_differentiate)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    kv_cu_seqlens_cpu: Tensor | None,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """``o`` ``[S, N, D]`` and ``lse`` ``[N, S]`` for q ``[S, N, D]``; ``api`` validates inputs and chooses ``impl``."""
    pairs = Pairs(cu_seqlens, cu_seqlens_cpu, kv_cu_seqlens_cpu, scale, window)
    _check_total("cu_seqlens", cu_seqlens_cpu, q)
    _check_total("kv_sequences", pairs.keys, k)
    if impl == "torch" and q.shape[0]:
        return torch_varlen.forward(q, k, v, sinks, pairs)
    return reference.forward(q, k, v, sinks, pairs)


def _check_total(name: str, cu_seqlens_cpu: Tensor, like: Tensor) -> None:
    """Reading the last entry is free here, and one too few would leave tokens of the output unwritten."""
    if int(cu_seqlens_cpu[-1]) != like.shape[0]:
        raise ValueError(
            f"varlen_attention: {name} must end at the number of tokens: expected B*T = {like.shape[0]}, "
            f"got {int(cu_seqlens_cpu[-1])}; describe padding as a document of its own"
        )
