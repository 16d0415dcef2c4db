"""``deltatune::varlen_attention``: schema, kernels, fake, autograd and FLOP formulas.

Opaque, because which queries meet which keys depends on where documents begin, which is data: the kernels read it from
the CPU copy, without waiting for a device.
"""

# S tokens of the stream, N query heads, M key heads, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._varlen_attention import reference, torch_varlen

__all__ = ["attend"]

_OPTIONS = "Tensor cu_seqlens, Tensor cu_seqlens_cpu, float scale, int? window, str impl"

torch.library.define("deltatune::varlen_attention", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "deltatune::varlen_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    *,
    scale: float,
    window: int | None,
    impl: str,
) -> Tensor:
    """``o`` ``[S, N, D]`` for q ``[S, N, D]`` and k, v ``[S, M, D]``; ``api`` validates inputs and chooses ``impl``."""
    o: Tensor = torch.ops.deltatune.varlen_attention(q, k, v, cu_seqlens, cu_seqlens_cpu, scale, window, impl)[0]
    return o


def _forward(
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
    with without_autocast(q):
        return reference.forward(q, k, v, cu_seqlens_cpu, scale, window)


def _backward(
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
    with without_autocast(q):
        return reference.backward(grad, q, k, v, o, lse, cu_seqlens_cpu, scale, window)


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _backward_fake(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor | None, _lse_grad: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.deltatune.varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


def _refuse_double_backward(_ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "varlen_attention has no second derivative; call backward() without create_graph=True, or detach its input"
    )


torch.library.impl("deltatune::varlen_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("deltatune::varlen_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("deltatune::varlen_attention", _forward_fake)
torch.library.register_fake("deltatune::varlen_attention_backward", _backward_fake)
torch.library.register_autograd("deltatune::varlen_attention", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("deltatune::varlen_attention_backward", _refuse_double_backward)


@register_flop_formula(torch.ops.deltatune.varlen_attention, get_raw=True)
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


@register_flop_formula(torch.ops.deltatune.varlen_attention_backward, get_raw=True)
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


def _visible_pairs(tokens: int, cu_seqlens_cpu: Tensor, window: int | None) -> int:
    """Exact from real boundaries; while tracing, where only shapes are known, as if the pack were one document."""
    if isinstance(cu_seqlens_cpu, FakeTensor) or cu_seqlens_cpu.is_meta:
        lengths = torch.tensor([tokens])
    else:
        lengths = cu_seqlens_cpu.diff().long()
    seen = lengths if window is None else lengths.clamp(max=window)
    # the first `seen` queries see 1, 2, ..., seen keys, the rest see `seen` each
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())
