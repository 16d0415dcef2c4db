"""Causal attention over packed documents: documentation, validation and choice."""

# B rows, T tokens a row, N query heads, M key heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._autocast import autocast
from deltatune.ops._registry import Choice, choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device, check_sequences
from deltatune.ops._varlen_attention import op as _op
from deltatune.ops._varlen_attention.providers import VarlenAttentionSpec
from deltatune.packing.sequences import Sequences

__all__ = ["choose_varlen_attention", "varlen_attention"]


def choose_varlen_attention(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Choice:
    """The implementation that ``varlen_attention`` takes for inputs of this kind, and why."""
    return choose(VarlenAttentionSpec(torch.device(device), dtype, head_dim, window), impl)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal softmax attention in which every document sees itself alone.

    ``o_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the keys ``j <= i`` of the document of ``i``, and with a
    window over ``i - window < j <= i`` only.

    Args:
        q: ``[B, T, N, D]``.
        k: ``[B, T, M, D]``; N is a multiple of M, and query head n reads key head ``n // (N // M)``.
        v: ``[B, T, M, D]``.
        sequences: the documents of the flattened ``[B * T]`` stream; without it each row is one document.
        scale: ``D ** -0.5`` if None.
        window: how many keys a query sees, itself included (``sliding_window`` of transformers); None is all.
        impl: ``"torch"``: FlashAttention-2 by ``torch.nn.attention.varlen``, fp16 or bf16 on NVIDIA GPUs, D a multiple
            of 8 up to 256. ``"reference"``: any device, any even D, accumulation in fp32 (fp64 for fp64); a document's
            results and gradients do not depend on another's values by a single bit, and memory grows with ``128 * T``
            per head, never with ``T * T``. ``"auto"``: the first that can run.

    Returns:
        ``[B, T, N, D]``, contiguous, in the dtype of ``q``.

    Under autocast q, k and v are cast to its dtype first, as torch does for its own attention; fp64 is left alone.
    Gradients are those of first order. Backward keeps q, k, v, the output and one fp32 number per token and query head.

    Raises:
        ValueError: shapes, dtypes, devices or sequences that do not fit each other, a window below 1, an odd D, or an
            ``impl`` that cannot run here.
    """
    q, k, v = autocast(q, k, v)
    _validate(q, k, v, sequences, window)
    choice = choose(VarlenAttentionSpec(q.device, q.dtype, q.shape[-1], window), impl)
    batch, tokens = q.shape[:2]
    if sequences is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
        cu_seqlens_cpu = torch.arange(batch + 1, dtype=torch.int32) * tokens
    else:
        cu_seqlens, cu_seqlens_cpu = sequences.cu_seqlens, sequences.cu_seqlens_cpu
    o, _ = _op.varlen_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens,
        cu_seqlens_cpu,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        window,
        choice.impl,
    )
    return o.view(batch, tokens, *o.shape[1:])


def _validate(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, window: int | None) -> None:
    op = "varlen_attention"
    sizes = bind_shapes(op, q=(q, "B T N D"), k=(k, "B T M D"), v=(v, "B T M D"))
    check_floating(op, q=q)
    check_same_device(op, q=q, k=k, v=v)
    check_sequences(op, sequences, q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if sizes["M"] == 0 or sizes["N"] % sizes["M"]:
        raise ValueError(f"{op}: the {sizes['N']} query heads of q must be a multiple of the {sizes['M']} of k and v")
    if sizes["D"] % 2 or sizes["D"] == 0:
        raise ValueError(f"{op}: head_dim must be even, got {sizes['D']}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window counts the keys a query sees, itself included: at least 1, got {window}")
