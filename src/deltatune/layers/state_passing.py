"""Sequence parallel of a recurrent layer by its state: a rank computes all heads for its own tokens of a pack.

What reaches a token from other ranks are the W - 1 tokens before the rank's first one, for the convolution, and the
state S of the one document that may have begun before, for the delta rule. The rule is affine in S: over a document's
tokens on rank p a head's state becomes ``M_p S + N_p``, where ``N_p`` is what they write from zero, and ``M_p`` what
they make of the identity. So every rank computes its map at once, the maps are gathered, and each rank applies those
of the ranks before it, in fp32::

    S_(p+1) = M_p S_p + N_p        M_p = 0 unless one document that began before holds all of rank p

Where no document goes on to a rank, none of its tokens reads S.

Which documents are first and last on a rank is data: boundaries select, and no rank runs another graph than others.
"""

# P ranks, t tokens of a rank, H key heads, G value heads, K key dim, V value dim, D channels, W width

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import ops
from deltatune.ops._opaque import opaque
from deltatune.packing.group import SequenceGroup
from deltatune.packing.sequences import Sequences

__all__ = ["delta_rule_over_ranks", "state_before", "tokens_before", "with_tokens_before"]


def with_tokens_before(x: Tensor, width: int, sequences: Sequences, group: SequenceGroup) -> tuple[Tensor, Sequences]:
    """``[1, t, D] -> [1, W - 1 + t, D]``: a rank's tokens behind those before them, zeros before the pack.

    Also where they are in their documents, by ``positions`` alone: no window reaches further back.
    """
    part, more = _part(sequences), width - 1
    before = tokens_before(x[0, max(0, x.shape[1] - more) :].contiguous(), more, group.size, group.rank, group.name)
    tokens = x.shape[1]
    positions = F.pad(sequences.positions, (more, 0)).narrow(0, group.rank * tokens, more + tokens)
    positions = torch.minimum(positions, _places(positions))
    return torch.cat([before[None], x], dim=1), replace(part, positions=positions)


def delta_rule_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, sequences: Sequences, group: SequenceGroup, impl: str
) -> Tensor:
    """``ops.gated_delta_rule`` of this rank's tokens ``[1, t, ...]``, q and k normalised, with what came before them.

    A token of a document that began on a rank before reads the state S that this rank's tokens begin with through
    ``q_i^T M_1..i S``, in which all but S is known before S is. The rule is linear in what it reads and writes, so the
    outputs of the documents from zero and this sum up. ``impl`` runs both.
    """
    own = ops.gated_delta_rule(q, k, v, g, beta, sequences=_part(sequences), qk_l2norm=False, impl=impl)
    positions = group.cut(sequences.positions)
    begins = _places(positions) - positions  # where a token's document begins, below 0 on a rank before
    carried, last = begins < 0, begins == begins[-1]
    reads, transition, written = _map_of_part(q, k, v, g, beta, carried, last, impl)
    rows = sequences.positions.view(group.size, -1)
    holds_all = rows[:, -1] >= rows.shape[1]  # one document, which began before, up to the last token
    state = state_before(written, transition, holds_all, group.rank, group.name)
    read = torch.einsum("btgk,gkv->btgv", reads, state.to(reads.dtype))
    return own + _where(carried, read)


def _map_of_part(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, carried: Tensor, last: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """``q_i^T M_1..i`` ``[1, t, G, K]``, M ``[G, K, K]`` and N ``[G, K, V]``, in one call of two rows.

    In the first row only the last document's tokens write, into zeros; in the second those of the document that is
    carried here change the identity. A token with k, beta and g of zero leaves a state as it is, and as all tokens of
    others are selected away, not multiplied by 0, nothing of them gets there, nor a gradient to them.
    """
    heads, key_dim, value_dim = v.shape[2], k.shape[3], v.shape[3]
    width = max(key_dim, value_dim)
    q = torch.cat([torch.zeros_like(q), _where(carried, q)])
    k, g, beta = (torch.cat([_where(last, x), _where(carried, x)]) for x in (k, g, beta))
    v = F.pad(_where(last, v), (0, width - value_dim))
    identity = torch.eye(key_dim, width, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
    initial = torch.stack([torch.zeros_like(identity), identity])[:, None].expand(2, heads, key_dim, width)
    v = torch.cat([v, torch.zeros_like(v)])
    out, final = ops.gated_delta_rule(
        q, k, v, g, beta, qk_l2norm=False, initial_state=initial, return_state=True, impl=impl
    )
    return out[1:, ..., :key_dim], final[1, ..., :key_dim], final[0, ..., :value_dim]


def _where(selected: Tensor, x: Tensor) -> Tensor:
    """``x`` ``[1, t, ...]`` at the selected tokens, zero elsewhere."""
    return torch.where(selected.view(-1, *[1] * (x.ndim - 2)), x, 0.0)


def _places(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[0], dtype=positions.dtype, device=positions.device)


def _part(sequences: Sequences) -> Sequences:
    if sequences.part is None:
        raise ValueError("a rank that passes states on needs sequences.part, its own part of the boundaries")
    return sequences.part


def _gather(x: Tensor, size: int, group: str) -> Tensor:
    """``[...] -> [P, ...]``: the value of each rank."""
    functional = torch.ops._c10d_functional
    gathered: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(x[None].contiguous(), size, group))
    return gathered


def _fake_tokens(tail: Tensor, count: int, *_: object) -> Tensor:
    return tail.new_empty(count, tail.shape[1])


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    tail, _, *ctx.ranks = inputs
    ctx.kept = tail.shape[0]


def _differentiate_tokens(ctx: Any, grad: Tensor) -> Tensor:
    return tokens_before_backward(grad, ctx.kept, *ctx.ranks)


@opaque(fake=lambda grad, kept, *_: grad.new_empty(kept, grad.shape[1]), gradient_of="sequence parallel by state")
def tokens_before_backward(grad: Tensor, kept: int, size: int, rank: int, group: str) -> Tensor:
    """The gradient of a rank's last tokens ``[m, D]``, a sum over all ranks before whose first ones they stand."""
    count = grad.shape[0]
    places = grad.new_zeros(count + size * kept, grad.shape[1])
    for of_rank, value in enumerate(_gather(grad, size, group)):
        places[of_rank * kept : of_rank * kept + count] += value
    return places[count + rank * kept :][:kept].clone()


@opaque(fake=_fake_tokens, setup_context=_save_tokens, backward=_differentiate_tokens, kept=True)
def tokens_before(tail: Tensor, count: int, size: int, rank: int, group: str) -> Tensor:
    """The ``count`` tokens before a rank's first ``[count, D]``, of as many ranks as hold them, zeros before all.

    ``tail`` ``[m, D]`` holds a rank's last tokens: ``count``, or all it has if these are fewer.
    """
    kept = tail.shape[0]
    behind = _gather(tail, size, group).flatten(0, 1)
    return F.pad(behind, (0, 0, count, 0))[rank * kept : rank * kept + count].clone()


def _save_state(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, transition, holds_all, *ctx.ranks = inputs
    ctx.save_for_backward(transition, output, holds_all)


def _differentiate_state(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *state_before_backward(grad, *ctx.saved_tensors, *ctx.ranks), None, None, None


@opaque(
    fake=lambda grad, transition, *_: (grad.new_empty(grad.shape), transition.new_empty(transition.shape)),
    gradient_of="sequence parallel by state",
)
def state_before_backward(
    grad: Tensor, transition: Tensor, state: Tensor, holds_all: Tensor, rank: int, group: str
) -> tuple[Tensor, Tensor]:
    """The gradients of N and M. With E the gradient of the state that a rank leaves: ``E_(p-1) = dS_p + M_p^T E_p``."""
    gathered = _gather(torch.cat([grad, transition], dim=-1), holds_all.shape[0], group)
    grads, transitions = torch.split(gathered, [grad.shape[-1], transition.shape[-1]], dim=-1)
    left = torch.zeros_like(grad)
    for p in range(holds_all.shape[0] - 1, rank, -1):
        passed = torch.where(holds_all[p], transitions[p], 0.0).mT @ torch.where(holds_all[p], left, 0.0)
        left = grads[p] + passed
    of_state = torch.where(holds_all[rank], left, 0.0) @ torch.where(holds_all[rank], state, 0.0).mT
    return left, of_state


@opaque(
    fake=lambda written, *_: written.new_empty(written.shape),
    setup_context=_save_state,
    backward=_differentiate_state,
    kept=True,
)
def state_before(written: Tensor, transition: Tensor, holds_all: Tensor, rank: int, group: str) -> Tensor:
    """The state ``[G, K, V]`` that a rank's first token begins with, from the map of each rank's last document.

    Args:
        written: N ``[G, K, V]``.
        transition: M ``[G, K, K]``, of the document that is carried to the rank.
        holds_all: ``[P]``, whether a document carried to a rank is its last one too; elsewhere M is not read.
        rank: of this process.
        group: the ranks, by the name of their process group.
    """
    gathered = _gather(torch.cat([written, transition], dim=-1), holds_all.shape[0], group)
    of_writes, transitions = torch.split(gathered, [written.shape[-1], transition.shape[-1]], dim=-1)
    state = torch.zeros_like(written)
    for p in range(rank):
        passed = torch.where(holds_all[p], transitions[p], 0.0) @ torch.where(holds_all[p], state, 0.0)
        state = of_writes[p] + passed
    return state
