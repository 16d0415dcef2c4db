"""Attention in plain torch: exact on any device, in memory that grows with T times the block, never with T squared.

Documents of equal length run as one batch, so that two hundred tiny ones cost a handful of matrix products. What is
computed for a document depends on its own values and on the lengths in the pack, never on another document's values.
"""

# S tokens of the stream, N query heads, M key heads, R = N // M, D head dim
# G sequences of one length, L their length, I queries of a block, J keys it sees

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._varlen_attention.pairs import Pairs

__all__ = ["backward", "forward", "sink_gradient"]

_QUERY_BLOCK = 128


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``o`` like ``q`` and the natural-log normaliser ``lse`` ``[N, S]``, accumulated in fp32 (fp64 for fp64)."""
    o, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q)),
    )
    for rows, key_rows in _by_length(pairs, q.device):
        qg, kg, vg = _queries(q, rows, k.shape[1]), _keys(k, key_rows), _keys(v, key_rows)
        ahead = key_rows.shape[1] - rows.shape[1]
        for block, seen in _blocks(rows.shape[1], ahead, pairs.window):
            mask = _mask(block, seen, ahead, pairs.window, q.device)
            scores = _scores(qg[..., block, :], kg[..., seen, :], pairs.scale, mask)
            normaliser = _with_sinks(scores.logsumexp(-1), sinks)
            weights = (scores - _finite(normaliser, ahead).unsqueeze(-1)).exp_()
            og = _per_key_head(weights) @ vg[..., seen, :]
            o[rows[:, block]] = _to_tokens(og.view(*normaliser.shape, -1)).to(o.dtype)
            lse[:, rows[:, block]] = normaliser.flatten(1, 2).transpose(0, 1)
    return o, lse


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv``; the weights of a block are recomputed from ``lse``, sinks included.

    ``P = exp(s q k^T - lse)``, ``dv = P^T do``, ``dS = P (do v^T - rowsum(do o) + dlse)``, ``dq = s dS k``,
    ``dk = s dS^T q``
    """
    heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # keys of a sequence without queries are in no pair
    empty = torch.empty_like if pairs.kv_cu_seqlens_cpu is None else torch.zeros_like
    dk, dv = (empty(x, memory_format=torch.contiguous_format) for x in (k, v))
    for rows, key_rows in _by_length(pairs, q.device):
        qg, kg, vg = _queries(q, rows, heads), _keys(k, key_rows), _keys(v, key_rows)
        dog = _queries(do, rows, heads)
        ahead = key_rows.shape[1] - rows.shape[1]
        mean = (dog * _queries(o, rows, heads)).sum(-1, keepdim=True)
        if dlse is not None:
            mean = mean - _per_query(dlse, rows, qg)
        normaliser = _finite(_per_query(lse, rows, qg), ahead)
        dkg, dvg = torch.zeros_like(kg), torch.zeros_like(vg)
        for block, seen in _blocks(rows.shape[1], ahead, pairs.window):
            qb, kb, vb, dob = qg[..., block, :], kg[..., seen, :], vg[..., seen, :], _per_key_head(dog[..., block, :])
            scores = _scores(qb, kb, pairs.scale, _mask(block, seen, ahead, pairs.window, q.device))
            weights = scores.sub_(normaliser[..., block, :]).exp_()
            dvg[..., seen, :] += _per_key_head(weights).mT @ dob
            dweights = (dob @ vb.mT).view_as(weights)
            dscores = _per_key_head(dweights.sub_(mean[..., block, :]).mul_(weights).mul_(pairs.scale))
            dkg[..., seen, :] += dscores.mT @ _per_key_head(qb)
            dq[rows[:, block]] = _to_tokens((dscores @ kb).view(qb.shape)).to(dq.dtype)
        dk[key_rows], dv[key_rows] = dkg.transpose(1, 2).to(dk.dtype), dvg.transpose(1, 2).to(dv.dtype)
    return dq, dk, dv


def sink_gradient(do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor) -> Tensor:
    """``dsink_n = sum_i exp(sink_n - lse_ni) (dlse_ni - do_in . o_in)``: a sink is a key whose value is zero."""
    dtype = lse.dtype
    pull = -(do.to(dtype) * o.to(dtype)).sum(-1).mT
    if dlse is not None:
        pull = pull + dlse
    return ((sinks.to(dtype).unsqueeze(1) - lse).exp() * pull).sum(1).to(sinks.dtype)


def _by_length(pairs: Pairs, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Token indices ``[G, L]`` of the queries and of the keys of all sequences of equal lengths; none without queries.

    Sequences past the end of either list of boundaries are empty there.
    """
    queries, keys = pairs.cu_seqlens_cpu, pairs.keys
    # the repeated tail says nothing, and is most of the tensor
    used = max(int(torch.searchsorted(x, x[-1])) for x in (queries, keys)) + 1
    queries, keys = (torch.cat([x[:used], x[-1:].expand(max(used - x.numel(), 0))]) for x in (queries, keys))
    lengths = torch.stack([queries.diff(), keys.diff()], dim=1)
    for length, key_length in sorted(set(map(tuple, lengths.tolist()))):
        if length > 0:
            same = (lengths == lengths.new_tensor([length, key_length])).all(1)
            rows, key_rows = (
                (x[:-1][same].long().unsqueeze(1) + torch.arange(n, device="cpu")).to(device)
                for x, n in ((queries, length), (keys, key_length))
            )
            yield rows, key_rows


def _blocks(length: int, ahead: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Each block of queries with the keys that any of them sees; the last query sees the last key."""
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        last = max(stop + ahead, 0)
        yield slice(start, stop), slice(0 if window is None else min(max(0, start + ahead - window + 1), last), last)


def _with_sinks(normaliser: Tensor, sinks: Tensor | None) -> Tensor:
    """``log(exp(normaliser) + exp(sink))`` ``[G, M, R, I]``, for sinks ``[N]``."""
    if sinks is None:
        return normaliser
    return torch.logaddexp(normaliser, sinks.to(normaliser.dtype).view(*normaliser.shape[1:3], 1))


def _finite(normaliser: Tensor, ahead: int) -> Tensor:
    """Of a query that sees no key, as there are where queries outnumber keys, 0: its weights are exp(-inf)."""
    return normaliser if ahead >= 0 else normaliser.masked_fill(normaliser == float("-inf"), 0.0)


def _per_query(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """``[N, S]`` -> ``[G, M, R, L, 1]``."""
    return x[:, rows].transpose(0, 1).reshape(*like.shape[:-1], 1)


def _mask(block: slice, seen: slice, ahead: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i may not look at key j: j > i or j <= i - window, i counted from the key it stands at."""
    queries = torch.arange(block.start + ahead, block.stop + ahead, device=device)
    distance = torch.arange(seen.start, seen.stop, device=device) - queries.unsqueeze(1)
    return distance > 0 if window is None else (distance > 0) | (distance <= -window)


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
