"""Causal attention over packed documents: documentation, validation and choice."""

# B rows, T tokens a row, N query heads, M key heads, D head dim

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from deltatune.ops._numerics import autocast
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_sequences, check_tensors, num_sequences
from deltatune.ops._varlen_attention import op as _op
from deltatune.ops._varlen_attention.providers import VarlenAttentionSpec
from deltatune.packing.sequences import Sequences

__all__ = ["varlen_attention"]


class _Options(TypedDict, total=False):
    sequences: Sequences | None
    scale: float | None
    window: int | None
    kv_sequences: Sequences | None
    sinks: Tensor | None
    impl: str


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    window: int | None = None,
    kv_sequences: Sequences | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention in which every document sees itself alone.

    ``o_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the keys ``j <= i`` of the document of ``i``, and with a
    window over ``i - window < j <= i`` only.

    Args:
        q: ``[B, T, N, D]``.
        k: ``[B, T, M, D]``, T of its own with ``kv_sequences``; N is a multiple of M, and query head n reads key head
            ``n // (N // M)``.
        v: like k.
        sequences: the documents of the flattened ``[B * T]`` stream; without it each row is one document.
        scale: ``D ** -0.5`` if None.
        window: how many keys a query sees, itself included (``sliding_window`` of transformers); None is all.
        kv_sequences: the sequences of k and v, where they are not those of q: as many, of their own lengths. The last
            query of a sequence sees its last key, the one before it one key less.
        sinks: ``[N]``, natural-log logits of a key with value zero that every query of a head sees: ``exp(sink)`` is
            added to the denominator.
        return_lse: whether the log of the denominator is returned too.
        impl: ``"torch"``: FlashAttention-2 by ``torch.nn.attention.varlen``, fp16 or bf16 on NVIDIA GPUs, D a multiple
            of 8 up to 256, without ``kv_sequences`` and ``return_lse``. ``"reference"``: any device, any even D,
            accumulation in fp32 (fp64 for fp64); a document's results and gradients do not depend on another's values
            by a single bit, and memory grows with ``128 * T`` per head, never with ``T * T``. ``"auto"``: the first
            that can run.

    Returns:
        ``[B, T, N, D]``, contiguous, in the dtype of ``q``; with ``return_lse`` also ``lse`` ``[N, B * T]``, natural
        log, fp32 (fp64 for fp64), sinks included, differentiable like the output. The output of a query that sees no
        key is 0, and its lse is that of the sinks alone: -inf without any.

    Under autocast q, k and v are cast to its dtype first, as torch does for its own attention; fp64 is left alone.
    Gradients are those of first order. Backward keeps q, k, v, the output and one fp32 number per token and query head.

    Examples:
        >>> q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
        >>> o = varlen_attention(q, k, v, sequences=Sequences.from_lengths([5, 7]))

        The last three queries of a document against all of its keys:

        >>> last = varlen_attention(q[:, 9:], k[:, 5:], v[:, 5:], kv_sequences=Sequences.from_lengths([7]))
        >>> torch.allclose(last, o[:, 9:], atol=1e-6)
        True

    Raises:
        ValueError: shapes, dtypes, devices or sequences that do not fit each other, a window below 1, an odd D, or an
            ``impl`` that cannot run here.
    """
    q, k, v = autocast(q, k, v)
    _validate(q, k, v, sequences, window, kv_sequences, sinks)
    different = kv_sequences is not None
    choice = choose(VarlenAttentionSpec(q.device, q.dtype, q.shape[-1], different, return_lse), impl)
    batch, tokens = q.shape[:2]
    if sequences is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
        cu_seqlens_cpu = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * tokens
    else:
        cu_seqlens, cu_seqlens_cpu = sequences.cu_seqlens, sequences.cu_seqlens_cpu
    o, lse = _op.varlen_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        sinks,
        cu_seqlens,
        cu_seqlens_cpu,
        None if kv_sequences is None else kv_sequences.cu_seqlens_cpu,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        window,
        choice.impl,
    )
    o = o.view(batch, tokens, *o.shape[1:])
    return (o, lse) if return_lse else o


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences | None,
    window: int | None,
    kv_sequences: Sequences | None,
    sinks: Tensor | None,
) -> None:
    op = "varlen_attention"
    keys = "B T M D" if kv_sequences is None else "C U M D"
    sizes = check_tensors(op, q=(q, "B T N D"), k=(k, keys), v=(v, keys), sinks=(sinks, "N"))
    if kv_sequences is not None:
        check_sequences(op, kv_sequences, k)
        _check_pairs(num_sequences(sequences, q), kv_sequences)
    check_sequences(op, sequences, q)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if sizes["M"] == 0 or sizes["N"] % sizes["M"]:
        raise ValueError(f"{op}: the {sizes['N']} query heads of q must be a multiple of the {sizes['M']} of k and v")
    if sizes["D"] % 2 or sizes["D"] == 0:
        raise ValueError(f"{op}: head_dim must be even, got {sizes['D']}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window counts the keys a query sees, itself included: at least 1, got {window}")


def _check_pairs(queries: int, kv_sequences: Sequences) -> None:
    """Descriptions of a graph count their repeated tails, which differ with the number of tokens: left to their makers.

    ``queries`` is the number of sequences of q.
    """
    given = kv_sequences.num_sequences
    if given != queries and given != kv_sequences.cu_seqlens.numel() - 1:
        raise ValueError(
            f"varlen_attention: kv_sequences must describe as many sequences as q has: expected {queries}, got "
            f"{given}; a sequence without keys has length 0"
        )
