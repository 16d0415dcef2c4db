"""Sequence parallel inside a layer: a rank's tokens with all heads become all tokens with a rank's heads, and back."""

# P ranks, t tokens of a rank, H heads of a projection, n = max(1, H / P) heads of a rank, D head dim

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._opaque import opaque
from deltatune.packing.group import SequenceGroup

__all__ = ["all_tokens", "from_every_rank", "heads_of_rank", "own_heads", "own_tokens", "sum_over_ranks"]


def heads_of_rank(heads: int, size: int) -> int:
    """n: of fewer heads than ranks each is read by ``size / heads`` ranks in turn."""
    return max(1, heads // size)


def own_heads(weight: Tensor, group: SequenceGroup) -> Tensor:
    """``[H, ...] -> [n, ...]``: this rank's part of a parameter that has an entry for each head.

    Its gradient is zero for the others, so it sums over ranks to that of one process.
    """
    heads = weight.shape[0]
    return weight.narrow(0, group.rank * heads // group.size, heads_of_rank(heads, group.size))


def all_tokens(parts: Sequence[Tensor], group: SequenceGroup) -> Tensor:
    """This rank's heads of every token of the pack, in one all-to-all.

    Args:
        parts: projections ``[1, t, H, D]`` of this rank's tokens; P divides H, or H divides P.
        group: the ranks.

    Returns:
        ``[1, P t, sum of n D]``: the parts side by side, in their widest dtype; tokens in the pack's order.
    """
    return _exchange(torch.cat([_by_rank(part, group.size) for part in parts], dim=-1), group).flatten(0, 1)[None]


def own_tokens(out: Tensor, group: SequenceGroup) -> Tensor:
    """``[1, P t, n, D] -> [1, t, P n, D]``: every head of this rank's tokens, in one all-to-all."""
    _, tokens, heads, width = out.shape
    blocks = out.reshape(group.size, tokens // group.size, heads, width)
    return _exchange(blocks, group).transpose(0, 1).flatten(1, 2)[None]


def from_every_rank(x: Tensor, group: SequenceGroup) -> Tensor:
    """``[...] -> [P, ...]``: the value of each rank; gradients of all ranks come back summed."""
    return _exchange(x.expand(group.size, *x.shape), group)


def sum_over_ranks(x: Tensor, group: SequenceGroup) -> Tensor:
    """The sum of every rank's value, the same bits on all of them; a gradient that comes in goes to all ranks."""
    return from_every_rank(x, group).sum(0)


def _by_rank(part: Tensor, size: int) -> Tensor:
    """``[1, t, H, D] -> [P, t, n D]``: for each rank the heads it reads."""
    _, tokens, heads, width = part.shape
    repeated = part[0].unsqueeze(2).expand(tokens, heads, max(1, size // heads), width)
    return repeated.reshape(tokens, size, -1).transpose(0, 1)


def _exchange(blocks: Tensor, group: SequenceGroup) -> Tensor:
    """``[P, ...]``: block p goes to rank p, and what comes from rank p is block p."""
    return exchange(blocks.contiguous(), group.size, group.name)


def _fake(blocks: Tensor, size: int, group: str) -> Tensor:
    del size, group
    return torch.empty_like(blocks)


def _setup_context(ctx: object, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    del output
    _, ctx.size, ctx.group = inputs  # type: ignore[attr-defined]


def _differentiate(ctx: object, grad: Tensor) -> Tensor:
    return exchange(grad.contiguous(), ctx.size, ctx.group)  # type: ignore[attr-defined]


@opaque(fake=_fake, setup_context=_setup_context, backward=_differentiate, kept=True)
def exchange(blocks: Tensor, size: int, group: str) -> Tensor:
    """All-to-all of ``size`` equal blocks, contiguous; backward sends each gradient where its block came from."""
    sizes = [blocks.shape[0] // size] * size
    functional = torch.ops._c10d_functional
    received = functional.all_to_all_single(blocks, sizes, sizes, group)
    done: Tensor = functional.wait_tensor(received)
    return done
