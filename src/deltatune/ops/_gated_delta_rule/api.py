"""The gated delta rule: the linear attention of Gated DeltaNet layers."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule import op
from deltatune.ops._gated_delta_rule.providers import GatedDeltaRuleSpec
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_floating, check_same_device, check_sequences, check_tensors, num_sequences
from deltatune.packing.sequences import Sequences

__all__ = ["gated_delta_rule"]


class _Kw(TypedDict, total=False):
    sequences: Sequences | None
    scale: float | None
    qk_l2norm: bool
    initial_state: Tensor | None
    impl: str


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, return_state: Literal[True], **kw: Unpack[_Kw]
) -> tuple[Tensor, Tensor]: ...


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, return_state: Literal[False] = ..., **kw: Unpack[_Kw]
) -> Tensor: ...


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear recurrence over each document, whose state ``S`` ``[K, V]`` begins at zero::

        S   <- exp(g_t) S
        S   <- S + k_t (beta_t (v_t - S^T k_t))^T
        o_t  = S^T (scale q_t)

    Args:
        q: ``[B, T, H, K]``, any strides, like all inputs.
        k: ``[B, T, H, K]``.
        v: ``[B, T, G, V]``, G a multiple of H; value head j reads key head ``j // (G // H)``.
        g: ``[B, T, G]``, natural-log decay, <= 0; fp32 with bf16 q, k and v is usual.
        beta: ``[B, T, G]``, the strength of each write.
        sequences: documents of the flattened ``[B*T]`` stream; None makes each row one document.
        scale: of q; None means ``K ** -0.5``.
        qk_l2norm: first replace q and k by ``x * rsqrt(sum(x^2) + 1e-6)``.
        initial_state: ``[S, G, K, V]``, the state that each of the S sequences begins with; zeros if None. S is the
            number of sequences: ``sequences.num_sequences``, or B.
        return_state: whether the state behind each sequence's last token is returned too.
        impl: ``"flash_qla"``: FlashQLA, bf16 or fp16 with K = V = 128 on GPUs of compute capability 9.0, 10.0 and 10.3.
            ``"fla"``: flash-linear-attention, bf16 or fp16 on other NVIDIA GPUs. ``"reference"``: anywhere.
            ``"auto"``: the first of these that can run.

    Returns:
        ``o`` in the shape and dtype of ``v``; with ``return_state`` also the final state ``[S, G, K, V]`` in fp32 (fp64
        if q, k or v is fp64), that of a sequence without tokens the initial one. Both states have gradients. What
        ``impl`` can be does not depend on them; the libraries carry a state in fp32, whatever the dtype of the initial
        one, and round it to the dtype of v where a product reads it.

        Accumulation is in fp32, or fp64 if q, k or v is fp64. Each gradient
        has the dtype of its input; the gradient of a document's output with respect to another document's inputs is
        exactly zero, and no value of a document reaches another, NaN and infinity included (but for gradients on FLA:
        there a NaN can reach those of neighbours). The libraries take a decay below -100 for -100: 0 all the same.

    The reference saves its inputs and runs forward again in backward. The libraries save v, g, beta, the normalised q
    and k with a number per token and head each, 64 numbers per token and value head, and the initial state. Backward
    cannot be differentiated itself (RuntimeError).

    Raises:
        ValueError: shapes or devices that do not fit, or an implementation that is unknown or cannot run.

    Examples:
        >>> q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
        >>> g, beta = -torch.rand(1, 12, 2), torch.rand(1, 12, 2)
        >>> whole = gated_delta_rule(q, k, v, g, beta)

        The same document in two pieces, the second of which begins with the state behind the first:

        >>> first, second = (
        ...     [x[:, part] for x in (q, k, v, g, beta)] for part in (slice(0, 5), slice(5, None))
        ... )
        >>> o, state = gated_delta_rule(*first, return_state=True)
        >>> rest = gated_delta_rule(*second, initial_state=state)
        >>> torch.allclose(torch.cat([o, rest], 1), whole, atol=1e-6)
        True

    Source: Gated Delta Networks, arXiv 2412.06464; the chunked form, arXiv 2406.06484.
    """
    _check(q, k, v, g, beta, sequences)
    stateful = return_state or initial_state is not None
    if stateful:
        initial_state = _state(initial_state, q, k, v, sequences)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    choice = choose(GatedDeltaRuleSpec(v.device, dtype, (k.shape[-1], v.shape[-1]), stateful), impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cu_seqlens_cpu = None if sequences is None else sequences.cu_seqlens_cpu
    o, *_, state = op.gated_delta_rule(q, k, v, g, beta, initial_state, scale, qk_l2norm, cu_seqlens_cpu, choice.impl)
    return (o, state) if return_state else o


def _state(initial_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None) -> Tensor:
    """The initial state, checked, or zeros."""
    expected = [num_sequences(sequences, v), v.shape[2], k.shape[3], v.shape[3]]
    if initial_state is None:
        return v.new_zeros(expected, dtype=accumulation_dtype(q, k, v))
    check_floating("gated_delta_rule", initial_state=initial_state)
    check_same_device("gated_delta_rule", v=v, initial_state=initial_state)
    if list(initial_state.shape) != expected:
        raise ValueError(
            f"gated_delta_rule: initial_state must be [number of sequences, G, K, V] = {expected}, got "
            f"{list(initial_state.shape)}; a sequence that begins anew has zeros there"
        )
    return initial_state


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sequences: Sequences | None) -> None:
    name = "gated_delta_rule"
    sizes = check_tensors(
        name, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T G V"), g=(g, "B T G"), beta=(beta, "B T G")
    )
    if sizes["H"] == 0 or sizes["G"] % sizes["H"]:
        raise ValueError(
            f"{name}: value heads must be a multiple of key heads, each key head serving G // H of them; "
            f"got G={sizes['G']} (v {list(v.shape)}) and H={sizes['H']} (k {list(k.shape)})"
        )
    check_sequences(name, sequences, v)
