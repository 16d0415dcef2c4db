"""Expert parallel inside a layer: tokens go to the ranks that hold their experts, and what those add up comes back.

A token goes once to each rank that holds one of its experts, whatever their number there, and comes back as one row:
that rank's part of the sum. Shapes depend on the number of tokens alone, so nothing waits for the device.
"""

# P ranks, t tokens of a rank, k experts of a token, X experts of all ranks, L = X / P of a rank, H hidden width
# C tokens that a rank sends to each rank, S = P * C that it gets, R rows that its experts take at most

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from deltatune.layers.exchange import exchange
from deltatune.ops._numerics import autocast

__all__ = ["CAPACITY_STEPS", "ExpertPart", "Mix", "mix_on_ranks"]

#: A capacity is a multiple of one over this, so that sizes are those of integers in a graph too.
CAPACITY_STEPS: Final = 1024

#: Of tokens ``[S, H]``, ids ``[S, k]`` (L and above absent), weights ``[S, k]`` and R: ``[S, H]``.
Mix = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class ExpertPart:
    """Which of a layer's experts this rank holds, and how many tokens there is room for.

    Attributes:
        group: the name of the process group whose ranks hold the layer's experts together.
        size: P.
        rank: of this process in it; it holds experts ``rank * L`` up to ``(rank + 1) * L``.
        held: L.
        capacity: how many times its even share ``t k`` of all ``P t k`` visits a rank's experts can take, a multiple of
            1 / 1024. From P on that is whatever routers do.
        load: fp64 ``[1]`` on the device, the capacity that the calls so far needed; above ``capacity`` visits were left
            out. A maximum, so a call that is computed again changes nothing.
        dtype: what float32 weights are computed with in; None for their own.
    """

    group: str
    size: int
    rank: int
    held: int
    capacity: float
    load: Tensor
    dtype: torch.dtype | None = None

    def room(self, tokens: int, top_k: int) -> tuple[int, int]:
        """``(C, R)`` for t tokens: ``min(t, capacity t k / P)`` and ``capacity t k``, in whole numbers."""
        visits = int(self.capacity * CAPACITY_STEPS) * tokens * top_k // CAPACITY_STEPS
        sent = min(tokens, max(1, visits // self.size))
        return sent, min(visits, self.size * sent * min(top_k, self.held))


class _Places(NamedTuple):
    """The tokens that go to each rank, in their order."""

    source: Tensor  # [S] int64, the token at each place; of places without one any
    filled: Tensor  # [P, C], places that have one
    place: Tensor  # [t, P] int64, where in S a token is among those for each rank
    goes: Tensor  # [t, P], whether it is there
    most: Tensor  # [] int64, tokens for the rank that most go to, those without a place counted


def mix_on_ranks(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, part: ExpertPart, mix: Mix) -> Tensor:
    """``sum_j w_j expert_j(x)`` over the experts of all ranks; every rank of the group calls it with as many tokens.

    Three all-to-alls, two in and one out: tokens ``[P, C, H]``, weights and ids ``[P, C, 2 k]``, sums ``[P, C, H]``.
    Backward sends gradients of tokens, of weights and of sums the other way. Received tokens and weights are kept for
    it where it reads them.

    Args:
        hidden: ``[t, H]``.
        top_k_index: ``[t, k]``, of all X experts; others are absent.
        top_k_weights: ``[t, k]``.
        part: what this rank holds; its ``load`` is updated.
        mix: of the experts that are here.

    Returns:
        ``[t, H]``. Each rank's sum is rounded to the dtype that experts compute in; then they are added up, in the
        order of ranks.
    """
    tokens, top_k = top_k_index.shape
    sent, rows = part.room(tokens, top_k)
    (cast,) = autocast(hidden)  # as the experts see it
    places = _places(top_k_index, part, sent)
    ids = top_k_index[places.source].view(part.size, sent, top_k)
    ids = ids - part.held * torch.arange(part.size, device=ids.device).view(-1, 1, 1)
    ids = torch.where(places.filled.unsqueeze(-1) & (ids >= 0) & (ids < part.held), ids, part.held)
    # one exchange for both: integers up to 2^24 are exact in float32
    wide = torch.promote_types(top_k_weights.dtype, torch.float32)
    weights = _spread(top_k_weights.to(wide), places).view(part.size, sent, top_k)
    known = _to_ranks(torch.cat([weights, ids.to(wide)], -1), part).flatten(0, 1)
    received = _to_ranks(_spread(cast, places).view(part.size, sent, -1), part).flatten(0, 1)
    weights, ids = known[:, :top_k], known[:, top_k:].detach().long()
    _note(part, places.most, (ids < part.held).sum(), tokens * top_k, all_fit=sent == tokens)
    sums = mix(received, ids, weights.to(top_k_weights.dtype), rows)
    returned = _to_ranks(sums.view(part.size, sent, -1), part).flatten(0, 1)
    return _collect(returned, places.source, places.place, places.goes).to(hidden.dtype)


def _places(top_k_index: Tensor, part: ExpertPart, sent: int) -> _Places:
    tokens = top_k_index.shape[0]
    ranks = torch.arange(part.size, device=top_k_index.device)
    owners = top_k_index.long().div(part.held, rounding_mode="floor")
    wants = (owners.unsqueeze(-1) == ranks).any(1)
    counts = wants.sum(0)
    number = wants.cumsum(0) - 1
    goes = wants & (number < sent)
    # a place more for each rank takes what goes nowhere
    spot = torch.where(goes, number, sent) + ranks * (sent + 1)
    each = torch.arange(tokens, device=spot.device).unsqueeze(1).expand(tokens, part.size)
    source = spot.new_zeros(part.size * (sent + 1)).scatter(0, spot.flatten(), each.flatten())
    filled = torch.arange(sent, device=spot.device) < counts.unsqueeze(1)
    place = number.clamp(0, sent - 1) + ranks * sent
    return _Places(source.view(part.size, -1)[:, :sent].flatten(), filled, place, goes, counts.max())


def _note(part: ExpertPart, most: Tensor, visits: Tensor, share: int, *, all_fit: bool) -> None:
    """Raises the load to what this call needed: for the visits to this rank's experts, and for its own tokens' way."""
    with torch.no_grad():
        needed = visits if all_fit else torch.maximum(visits, most * part.size)
        part.load.copy_(torch.maximum(part.load, needed.double() / share))


def _to_ranks(blocks: Tensor, part: ExpertPart) -> Tensor:
    """``[P, C, ...]``: block p goes to rank p, and what comes from rank p is block p."""
    return exchange(blocks.contiguous(), part.size, part.group)


def _spread(x: Tensor, places: _Places) -> Tensor:
    """``[t, ...] -> [S, ...]``, each place's token."""
    return _spread_rows(x, places.source, places.place, places.goes)


class _Spread(torch.autograd.Function):
    """Backward reads each token's places, where torch's own would add rows into zeros with atomics."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, source: Tensor, place: Tensor, goes: Tensor) -> Tensor:
        ctx.save_for_backward(place, goes)
        return x[source]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_of_places(dy, *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    """``[S, H] -> [t, H]``, the sum over the places of each token."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, source: Tensor, place: Tensor, goes: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_of_places(rows, place, goes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        # a place without a token gets one's gradient, which ends there: none of its experts is present
        return dy[source], None, None, None


_spread_rows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _Spread.apply
_collect: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _Collect.apply


def _sum_of_places(rows: Tensor, place: Tensor, goes: Tensor) -> Tensor:
    # a select: a place without this token may hold anything
    return torch.where(goes.unsqueeze(-1), rows[place], 0).sum(1)
