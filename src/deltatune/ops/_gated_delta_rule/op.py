"""``deltatune::gated_delta_rule``: the schema, its gradient and its cost, opaque to the compiler.

Opaque, because the scan over chunks would otherwise be unrolled into every graph, and because the chunks depend on
where documents begin, which is data: the kernels read that from the CPU copy, without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule import library, reference
from deltatune.ops._gated_delta_rule.chunks import CHUNK_SIZES
from deltatune.ops._gated_delta_rule.library import Results, results_like
from deltatune.ops._gated_delta_rule.providers import GatedDeltaRuleSpec
from deltatune.ops._gated_delta_rule.reference import Inputs
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque

__all__ = ["gated_delta_rule"]

# Both ops begin with ``Inputs``, the boundaries and the implementation. Forward returns what its implementation keeps
# for backward besides o (see ``Results``; the reference keeps nothing), and backward takes that last, with q and k
# normalised where forward normalised them.
_INPUTS = len(Inputs._fields)


def _boundaries(v: Tensor, cu_seqlens_cpu: Tensor | None) -> Tensor:
    """Cumulative lengths on the CPU; without any, each row is one document."""
    batch, tokens = v.shape[:2]
    if cu_seqlens_cpu is None:
        return torch.arange(batch + 1, device="cpu") * tokens
    # reading the last entry is free here, and one too few would leave tokens of the output unwritten
    if int(cu_seqlens_cpu[-1]) != batch * tokens:
        raise ValueError(
            f"gated_delta_rule: cu_seqlens must end at the number of tokens: expected B*T = {batch * tokens}, "
            f"got {int(cu_seqlens_cpu[-1])}; describe padding as a document of its own"
        )
    return cu_seqlens_cpu


# Multiply-adds per token and value head, in matrix products alone. C is the chunk, and a triangular solve of C rows
# counts as the half product it is. Reading documents would need data, so every chunk counts as full.
def _forward_flops(q_shape: Sequence[int], _: object, v_shape: Sequence[int], *__: object, **___: object) -> int:
    batch, tokens, heads, value_dim = v_shape
    key_dim, chunk = q_shape[-1], CHUNK_SIZES[-1]
    intra = 2 * chunk * key_dim + chunk * (key_dim + value_dim) // 2 + chunk * value_dim
    return 2 * batch * tokens * heads * (intra + 3 * key_dim * value_dim)


def _backward_flops(q_shape: Sequence[int], _: object, v_shape: Sequence[int], *__: object, **___: object) -> int:
    batch, tokens, heads, value_dim = v_shape
    key_dim, chunk = q_shape[-1], CHUNK_SIZES[-1]
    again = 2 * chunk * key_dim + chunk * (key_dim + value_dim) // 2 + 2 * key_dim * value_dim
    intra = 3 * chunk * key_dim + 3 * chunk * value_dim + chunk * value_dim // 2
    return 2 * batch * tokens * heads * (again + intra + 8 * key_dim * value_dim)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, initial_state = args[:6]
    state_grad = args[2].new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return *(x.new_empty(x.shape) for x in inputs), state_grad


def _backward_workspace(*args: Any) -> int:
    q, _, v, *_ = args
    impl = args[_INPUTS + 1]
    return 0 if impl == "reference" else int(GatedDeltaRuleSpec.load(impl).backward_workspace(q, v))


@opaque(fake=_backward_fake, flops=_backward_flops, workspace=_backward_workspace, gradient_of="gated_delta_rule")
def gated_delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    cu_seqlens_cpu: Tensor | None,
    impl: str,
    grad: Tensor,
    final_grad: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    decay: Tensor,
    solved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state, the last one ``[0]`` without one."""
    inputs = Inputs(q, k, v, g, beta, initial_state, scale, qk_l2norm)
    boundaries = _boundaries(v, cu_seqlens_cpu)
    if impl == "reference":
        grads = reference.backward(grad, inputs, boundaries, final_grad)
    else:
        kept = (q_rstd, k_rstd, decay, solved)
        grads = library.backward(GatedDeltaRuleSpec.load(impl).LIBRARY, grad, inputs, kept, boundaries, final_grad)
    return *grads[:5], v.new_empty(0) if grads.initial_state is None else grads.initial_state


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[:_INPUTS])
    v, state, dtype = inputs.v, inputs.initial_state, accumulation_dtype(*inputs[:3])
    final = v.new_empty(0) if state is None else state.new_empty(state.shape, dtype=dtype)
    return *results_like(inputs, saves=args[-1] != "reference"), final


def _setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    inputs, (cu_seqlens_cpu, impl) = Inputs(*args[:_INPUTS]), args[_INPUTS:]
    results, final = Results(*output[:-1]), output[-1]
    ctx.mark_non_differentiable(*results[1:], *([final] if inputs.initial_state is None else []))
    ctx.set_materialize_grads(False)
    if inputs.qk_l2norm and impl != "reference":
        inputs = inputs._replace(q=results.q, k=results.k)
    ctx.save_for_backward(*inputs[:6], cu_seqlens_cpu, *results[3:])
    ctx.options = inputs.scale, inputs.qk_l2norm, impl


def _differentiate(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    final_grad = others[-1]
    if grad is None and final_grad is None:
        return (None,) * 10
    *inputs, cu_seqlens_cpu, q_rstd, k_rstd, decay, solved = ctx.saved_tensors
    scale, qk_l2norm, impl = ctx.options
    grad = torch.zeros_like(inputs[2]) if grad is None else grad
    kept = (q_rstd, k_rstd, decay, solved)
    grads = gated_delta_rule_backward(*inputs, scale, qk_l2norm, cu_seqlens_cpu, impl, grad, final_grad, *kept)
    wanted = (x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None)


@opaque(fake=_forward_fake, flops=_forward_flops, setup_context=_setup_context, backward=_differentiate)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    cu_seqlens_cpu: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, what backward keeps of it, and the final state, which is ``[0]`` without an initial one."""
    inputs = Inputs(q, k, v, g, beta, initial_state, scale, qk_l2norm)
    boundaries = _boundaries(v, cu_seqlens_cpu)
    if impl == "reference":
        o, final = reference.forward(inputs, boundaries)
        results = results_like(inputs, saves=False)._replace(o=o)
    else:
        results, final = library.forward(GatedDeltaRuleSpec.load(impl).LIBRARY, inputs, boundaries)
    return *results, v.new_empty(0) if final is None else final
