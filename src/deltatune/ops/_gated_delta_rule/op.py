"""``deltatune::gated_delta_rule``: the schema, its gradient and its cost, opaque to the compiler.

Opaque, because the scan over chunks would otherwise be unrolled into every graph, and because the chunks depend on
where documents begin, which is data: the kernels read that from the CPU copy, without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule import library, reference
from deltatune.ops._gated_delta_rule.chunks import CHUNK_SIZES
from deltatune.ops._gated_delta_rule.documents import Documents, documents_of
from deltatune.ops._gated_delta_rule.library import Results, results_like
from deltatune.ops._gated_delta_rule.providers import GatedDeltaRuleSpec
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque

__all__ = ["gated_delta_rule"]

# Forward returns what its implementation keeps for backward besides o (see ``library.Results``; the reference keeps
# nothing), and backward takes that after q, k, v, g and beta, with q and k normalised where forward normalised them.


class _Options(TypedDict):
    scale: float
    qk_l2norm: bool


def _check_total(v: Tensor, cu_seqlens_cpu: Tensor | None) -> None:
    """Reading the last entry is free here, and one too few would leave tokens of the output unwritten."""
    tokens = v.shape[0] * v.shape[1]
    if cu_seqlens_cpu is not None and int(cu_seqlens_cpu[-1]) != tokens:
        raise ValueError(
            f"gated_delta_rule: cu_seqlens must end at the number of tokens: expected B*T = {tokens}, "
            f"got {int(cu_seqlens_cpu[-1])}; describe padding as a document of its own"
        )


def _boundaries(v: Tensor, cu_seqlens_cpu: Tensor | None) -> Tensor:
    """Cumulative lengths on the CPU; without any, each row is one document."""
    return torch.arange(v.shape[0] + 1) * v.shape[1] if cu_seqlens_cpu is None else cu_seqlens_cpu


def _documents(v: Tensor, cu_seqlens_cpu: Tensor | None) -> Documents:
    """The same boundaries for a library on the device of ``v``."""
    return documents_of(_boundaries(v, cu_seqlens_cpu), v.device)


# Multiply-adds per token and value head, in matrix products alone. C is the chunk, and a triangular solve of C rows
# counts as the half product it is. Reading documents would need data, so every chunk counts as full.
def _forward_flops(
    q_shape: Sequence[int], _k_shape: Sequence[int], v_shape: Sequence[int], *_: object, **__: object
) -> int:
    batch, tokens, heads, value_dim = v_shape
    key_dim, chunk = q_shape[-1], CHUNK_SIZES[-1]
    intra = 2 * chunk * key_dim + chunk * (key_dim + value_dim) // 2 + chunk * value_dim
    return 2 * batch * tokens * heads * (intra + 3 * key_dim * value_dim)


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


def _backward_fake(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    initial_state = rest[4]
    grads = [x.new_empty(x.shape) for x in (q, k, v, g, beta)]
    return *grads, v.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)


def _backward_workspace(_grad: Tensor, q: Tensor, _k: Tensor, v: Tensor, *rest: Any) -> int:
    impl: str = rest[-1]
    return 0 if impl == "reference" else int(GatedDeltaRuleSpec.load(impl).backward_workspace(q, v))


@opaque(fake=_backward_fake, flops=_backward_flops, workspace=_backward_workspace, gradient_of="gated_delta_rule")
def gated_delta_rule_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    decay: Tensor,
    solved: Tensor,
    initial_state: Tensor | None,
    final_grad: Tensor | None,
    _cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state, the last one ``[0]`` without one."""
    _check_total(v, cu_seqlens_cpu)
    inputs, options = (grad, q, k, v, g, beta), _Options(scale=scale, qk_l2norm=qk_l2norm)
    if impl != "reference":
        kept = (q_rstd, k_rstd, decay, solved, _documents(v, cu_seqlens_cpu))
        return *library.backward(GatedDeltaRuleSpec.load(impl), *inputs, *kept, **options), v.new_empty(0)
    if initial_state is not None and final_grad is None:
        final_grad = torch.zeros_like(initial_state)
    boundaries = _boundaries(v, cu_seqlens_cpu)
    grads, dinitial = reference.backward_with_state(*inputs, boundaries, initial_state, final_grad, **options)
    if initial_state is None or dinitial is None:
        return *grads, v.new_empty(0)
    return *grads, dinitial.to(initial_state.dtype)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _g: Tensor,
    _beta: Tensor,
    initial_state: Tensor | None,
    _cu_seqlens: Tensor | None,
    _cu_seqlens_cpu: Tensor | None,
    _scale: float,
    qk_l2norm: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    results = results_like(q, k, v, qk_l2norm=qk_l2norm, saves=impl != "reference")
    return *results, _state_like(initial_state, q, k, v)


def _state_like(initial_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An uninitialised final state; ``[0]`` without an initial one."""
    if initial_state is None:
        return v.new_empty(0)
    return v.new_empty(initial_state.shape, dtype=accumulation_dtype(q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    results, initial_state = Results(*output[:-1]), inputs[5]
    ctx.mark_non_differentiable(*results[1:], *([output[-1]] if initial_state is None else []))
    ctx.set_materialize_grads(False)
    *_, qk_l2norm, impl = inputs
    q, k = results[1:3] if qk_l2norm and impl != "reference" else inputs[:2]
    ctx.save_for_backward(q, k, *inputs[2:5], *results[3:], *inputs[5:8])
    ctx.options = inputs[8:]


def _differentiate(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    final_grad = others[-1]
    if grad is None and final_grad is None:
        return (None,) * 11
    *kept, initial_state, cu_seqlens, cu_seqlens_cpu = ctx.saved_tensors
    grad = torch.zeros_like(kept[2]) if grad is None else grad
    grads = gated_delta_rule_backward(grad, *kept, initial_state, final_grad, cu_seqlens, cu_seqlens_cpu, *ctx.options)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


@opaque(fake=_forward_fake, flops=_forward_flops, setup_context=_setup_context, backward=_differentiate)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    _cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, what backward keeps of it, and the final state, which is ``[0]`` without an initial one."""
    _check_total(v, cu_seqlens_cpu)
    inputs, options = (q, k, v, g, beta), _Options(scale=scale, qk_l2norm=qk_l2norm)
    if impl != "reference":
        documents = _documents(v, cu_seqlens_cpu)
        return *library.forward(GatedDeltaRuleSpec.load(impl), *inputs, documents, **options), v.new_empty(0)
    boundaries = _boundaries(v, cu_seqlens_cpu)
    o, final = reference.forward_with_state(*inputs, boundaries, initial_state, **options)
    results = results_like(q, k, v, qk_l2norm=qk_l2norm, saves=False)._replace(o=o)
    return *results, v.new_empty(0) if final is None else final
