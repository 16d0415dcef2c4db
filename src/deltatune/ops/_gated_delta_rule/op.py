"""``deltatune::gated_delta_rule``: the schema, its gradient and its cost, opaque to the compiler.

Opaque, because the scan over chunks would otherwise be unrolled into every graph, and because the chunks depend on
where documents begin, which is data: the kernels read that from the CPU copy, without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._gated_delta_rule import reference
from deltatune.ops._gated_delta_rule.chunks import CHUNK_SIZES

__all__ = ["gated_delta_rule"]

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, "
    "float scale, bool qk_l2norm, str impl"
)


class _Implementation(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


_IMPLEMENTATIONS = {"reference": _Implementation(reference.forward, reference.backward)}

torch.library.define("deltatune::gated_delta_rule", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "deltatune::gated_delta_rule_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    impl: str,
) -> Tensor:
    """Calls the op; inputs are validated and ``impl`` is chosen by ``api``."""
    o: Tensor = torch.ops.deltatune.gated_delta_rule(
        q, k, v, g, beta, cu_seqlens, cu_seqlens_cpu, scale, qk_l2norm, impl
    )
    return o


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    _cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    impl: str,
) -> Tensor:
    boundaries = _boundaries(v, cu_seqlens_cpu)
    forward = _IMPLEMENTATIONS[impl].forward
    with without_autocast(v):
        return forward(q, k, v, g, beta, boundaries, scale=scale, qk_l2norm=qk_l2norm)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    _cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    boundaries = _boundaries(v, cu_seqlens_cpu)
    backward = _IMPLEMENTATIONS[impl].backward
    with without_autocast(v):
        return backward(grad, q, k, v, g, beta, boundaries, scale=scale, qk_l2norm=qk_l2norm)


def _boundaries(v: Tensor, cu_seqlens_cpu: Tensor | None) -> Tensor:
    """Cumulative lengths on the CPU; without any, each row is one document."""
    batch, tokens = v.shape[:2]
    if cu_seqlens_cpu is None:
        return torch.arange(batch + 1) * tokens
    # reading the last entry is free here, and one too few would leave tokens of the output unwritten
    if int(cu_seqlens_cpu[-1]) != batch * tokens:
        raise ValueError(
            f"gated_delta_rule: cu_seqlens must end at the number of tokens: expected B*T = {batch * tokens}, "
            f"got {int(cu_seqlens_cpu[-1])}; describe padding as a document of its own"
        )
    return cu_seqlens_cpu


def _forward_fake(_q: Tensor, _k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


def _backward_fake(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], **_: object) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.deltatune.gated_delta_rule_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


def _refuse_double_backward(_ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "gated_delta_rule has no second derivative; call backward() without create_graph=True, or detach its input"
    )


torch.library.impl("deltatune::gated_delta_rule", "CompositeExplicitAutograd", _forward)
torch.library.impl("deltatune::gated_delta_rule_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("deltatune::gated_delta_rule", _forward_fake)
torch.library.register_fake("deltatune::gated_delta_rule_backward", _backward_fake)
torch.library.register_autograd("deltatune::gated_delta_rule", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("deltatune::gated_delta_rule_backward", _refuse_double_backward)


# Multiply-adds per token and value head, in matrix products alone. C is the chunk, and a triangular solve of C rows
# counts as the half product it is. Reading documents would need data, so every chunk counts as full.
@register_flop_formula(torch.ops.deltatune.gated_delta_rule)
def _forward_flops(
    q_shape: Sequence[int], _k_shape: Sequence[int], v_shape: Sequence[int], *_: object, **__: object
) -> int:
    batch, tokens, heads, value_dim = v_shape
    key_dim, chunk = q_shape[-1], CHUNK_SIZES[-1]
    intra = 2 * chunk * key_dim + chunk * (key_dim + value_dim) // 2 + chunk * value_dim
    return 2 * batch * tokens * heads * (intra + 3 * key_dim * value_dim)


@register_flop_formula(torch.ops.deltatune.gated_delta_rule_backward)
def _backward_flops(
    _grad_shape: Sequence[int],
    q_shape: Sequence[int],
    _k_shape: Sequence[int],
    v_shape: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    batch, tokens, heads, value_dim = v_shape
    key_dim, chunk = q_shape[-1], CHUNK_SIZES[-1]
    again = 2 * chunk * key_dim + chunk * (key_dim + value_dim) // 2 + 2 * key_dim * value_dim
    intra = 3 * chunk * key_dim + 3 * chunk * value_dim + chunk * value_dim // 2
    return 2 * batch * tokens * heads * (again + intra + 8 * key_dim * value_dim)
