"""Attention in plain torch: exact on any device, in memory that grows with T times the block, never with T squared.

Documents of equal length run as one batch, so that two hundred tiny ones cost a handful of matrix products. What is
computed for a document depends on its own values and on the lengths in the pack, never on another document's values.
"""

# S tokens of the stream, N query heads, M key heads, R = N // M, D head dim
# G documents of one length, L their length, I queries of a block, J keys it sees

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["backward", "forward"]

_QUERY_BLOCK = 128


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_cpu: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """``o`` like ``q`` and the natural-log normaliser ``lse`` ``[N, S]``, accumulated in fp32 (fp64 for fp64)."""
    o, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q)),
    )
    for rows in _documents_by_length(cu_seqlens_cpu, q.device):
        qg, kg, vg = _queries(q, rows, k.shape[1]), _keys(k, rows), _keys(v, rows)
        for block, seen in _blocks(rows.shape[1], window):
            scores = _scores(qg[..., block, :], kg[..., seen, :], scale, _mask(block, seen, window, q.device))
            normaliser = scores.logsumexp(-1)
            weights = (scores - normaliser.unsqueeze(-1)).exp_()
            og = _per_key_head(weights) @ vg[..., seen, :]
            o[rows[:, block]] = _to_tokens(og.view(*normaliser.shape, -1)).to(o.dtype)
            lse[:, rows[:, block]] = normaliser.flatten(1, 2).transpose(0, 1)
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv``; the weights of a block are recomputed from ``lse``.

    ``P = exp(s q k^T - lse)``, ``dv = P^T do``, ``dS = P (do v^T - rowsum(do o))``, ``dq = s dS k``, ``dk = s dS^T q``
    """
    heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows in _documents_by_length(cu_seqlens_cpu, q.device):
        qg, kg, vg = _queries(q, rows, heads), _keys(k, rows), _keys(v, rows)
        dog = _queries(do, rows, heads)
        mean = (dog * _queries(o, rows, heads)).sum(-1, keepdim=True)
        normaliser = lse[:, rows].transpose(0, 1).reshape(*qg.shape[:-1], 1)
        dkg, dvg = torch.zeros_like(kg), torch.zeros_like(vg)
        for block, seen in _blocks(rows.shape[1], window):
            qb, kb, vb, dob = qg[..., block, :], kg[..., seen, :], vg[..., seen, :], _per_key_head(dog[..., block, :])
            scores = _scores(qb, kb, scale, _mask(block, seen, window, q.device))
            weights = scores.sub_(normaliser[..., block, :]).exp_()
            dvg[..., seen, :] += _per_key_head(weights).mT @ dob
            dweights = (dob @ vb.mT).view_as(weights)
            dscores = _per_key_head(dweights.sub_(mean[..., block, :]).mul_(weights).mul_(scale))
            dkg[..., seen, :] += dscores.mT @ _per_key_head(qb)
            dq[rows[:, block]] = _to_tokens((dscores @ kb).view(qb.shape)).to(dq.dtype)
        dk[rows], dv[rows] = dkg.transpose(1, 2).to(dk.dtype), dvg.transpose(1, 2).to(dv.dtype)
    return dq, dk, dv


def _documents_by_length(cu_seqlens_cpu: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Token indices ``[G, L]`` of all documents of one length, for every length but zero."""
    lengths = cu_seqlens_cpu.diff()
    for length in sorted(set(lengths.tolist())):
        if length > 0:
            starts = cu_seqlens_cpu[:-1][lengths == length].long()
            yield (starts.unsqueeze(1) + torch.arange(length)).to(device)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Each block of queries with the keys that any of them sees."""
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _mask(block: slice, seen: slice, window: int | None, device: torch.device) -> Tensor:
    """True where query i may not look at key j: j > i or j <= i - window."""
    ahead = torch.arange(seen.start, seen.stop, device=device) - torch.arange(
        block.start, block.stop, device=device
    ).unsqueeze(1)
    return ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)


def _queries(x: Tensor, rows: Tensor, key_heads: int) -> Tensor:
    """``[S, N, D]`` -> ``[G, M, R, L, D]``: the query heads of one key head next to each other."""
    x = x[rows].view(*rows.shape, key_heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
    return x.to(accumulation_dtype(x), memory_format=torch.contiguous_format)


def _keys(x: Tensor, rows: Tensor) -> Tensor:
    """``[S, M, D]`` -> ``[G, M, L, D]``."""
    x = x[rows].transpose(1, 2)
    return x.to(accumulation_dtype(x), memory_format=torch.contiguous_format)


def _per_key_head(x: Tensor) -> Tensor:
    """``[G, M, R, I, ...]`` -> ``[G, M, R * I, ...]``: one matrix product serves all the query heads of a key head."""
    return x.flatten(2, 3)


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    scores = (_per_key_head(q) @ k.mT).mul_(scale).view(*q.shape[:-1], k.shape[-2])
    return scores.masked_fill_(mask, float("-inf"))


def _to_tokens(x: Tensor) -> Tensor:
    """``[G, M, R, I, D]`` -> ``[G, I, N, D]``, to be written at ``rows[:, block]``."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)
