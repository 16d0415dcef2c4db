"""The gated delta rule: the linear attention of Gated DeltaNet layers."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule import op
from deltatune.ops._gated_delta_rule.providers import GatedDeltaRuleSpec
from deltatune.ops._registry import Choice, choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device, check_sequences
from deltatune.packing.sequences import Sequences

__all__ = ["choose_gated_delta_rule", "gated_delta_rule"]


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
    impl: str = "auto",
) -> Tensor:
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
        impl: ``"flash_qla"``: FlashQLA, bf16 or fp16 with K = V = 128 on GPUs of compute capability 9.0, 10.0 and 10.3.
            ``"fla"``: flash-linear-attention, bf16 or fp16 on other NVIDIA GPUs. ``"reference"``: anywhere.
            ``"auto"``: the first of these that can run.

    Returns:
        ``o`` in the shape and dtype of ``v``. Accumulation is in fp32, or fp64 if q, k or v is fp64. Each gradient
        has the dtype of its input; the gradient of a document's output with respect to another document's inputs is
        exactly zero, and no value of a document reaches another, NaN and infinity included (but for gradients on FLA:
        there a NaN can reach those of neighbours). The libraries take a decay below -100 for -100: 0 all the same.

    The reference saves its inputs and runs forward again in backward. The libraries save v, g, beta, the normalised q
    and k with a number per token and head each, and 64 numbers per token and value head. Backward cannot be
    differentiated itself (RuntimeError).

    Raises:
        ValueError: shapes or devices that do not fit, or an implementation that is unknown or cannot run.

    Source: Gated Delta Networks, arXiv 2412.06464; the chunked form, arXiv 2406.06484.
    """
    _check(q, k, v, g, beta, sequences)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    choice = choose(GatedDeltaRuleSpec(v.device, dtype, (k.shape[-1], v.shape[-1])), impl)
    return op.gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        None if sequences is None else sequences.cu_seqlens,
        None if sequences is None else sequences.cu_seqlens_cpu,
        q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm,
        choice.impl,
    )[0]


def choose_gated_delta_rule(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dims: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Choice:
    """Which implementation of ``gated_delta_rule`` runs for q, k and v of this dtype, heads of K and V, and why."""
    return choose(GatedDeltaRuleSpec(torch.device(device), dtype, head_dims), impl)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sequences: Sequences | None) -> None:
    name = "gated_delta_rule"
    patterns = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T G V"),
        "g": (g, "B T G"),
        "beta": (beta, "B T G"),
    }
    sizes = bind_shapes(name, **patterns)
    if sizes["H"] == 0 or sizes["G"] % sizes["H"]:
        raise ValueError(
            f"{name}: value heads must be a multiple of key heads, each key head serving G // H of them; "
            f"got G={sizes['G']} (v {list(v.shape)}) and H={sizes['H']} (k {list(k.shape)})"
        )
    check_floating(name, q=q, k=k, v=v, g=g, beta=beta)
    check_same_device(name, q=q, k=k, v=v, g=g, beta=beta)
    check_sequences(name, sequences, v)
