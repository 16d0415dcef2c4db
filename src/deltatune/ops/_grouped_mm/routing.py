"""Tokens to experts and back: rows sorted by expert, and the sum of each token's results.

Shapes depend on T and k alone, whatever the routing. Every move is a gather, forward and backward.
"""

# T tokens, k experts a token goes to, R rows (T * k unless fewer are asked for), X experts, H hidden width

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from deltatune.ops._grouped_mm.linear import Copies

__all__ = ["Routing", "combine", "permute", "route"]


class Routing(NamedTuple):
    """The rows of a batch: one for each token and expert it goes to, sorted by expert, absent ones last."""

    order: Tensor  # [R] int64, the slot t * k + j of each row
    place: Tensor  # [T * k] int64, the row of each slot
    experts: Tensor  # [R] int64, sorted; X of absent rows
    offsets: Tensor  # [X] int32, where each expert's rows end

    def copies(self, top_k: int) -> Copies:
        """Which token a row copies, and where a token's rows are."""
        return Copies(self.order // top_k, self.place.view(-1, top_k))


def route(top_k_index: Tensor, num_experts: int, max_rows: int | None = None) -> Routing:
    """Of experts ``[T, k]``; an id outside ``[0, X)``, -1 and X among them, marks a slot that goes nowhere.

    With ``max_rows`` there is a place for so many slots that go somewhere, and ``R = max_rows + 1``: the last row is
    absent, and the row of every slot without one.
    """
    slots = top_k_index.flatten().long()
    # before the sort: below 0 they would come first, and be taken for the rows of expert 0
    slots = torch.where((slots >= 0) & (slots < num_experts), slots, num_experts)
    order = slots.argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    experts = slots[order]
    if max_rows is not None and max_rows < order.shape[0]:
        order, place = order[: max_rows + 1], place.clamp(max=max_rows)
        experts = torch.constant_pad_nd(experts[:max_rows], (0, 1), num_experts)
    each = torch.arange(num_experts, device=order.device, dtype=experts.dtype)
    return Routing(order, place, experts, torch.searchsorted(experts, each, right=True, out_int32=True))


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` whose backward is a gather too, where torch's own adds rows into zeros with atomics."""
    return _permute(x, order, inverse)


def combine(rows: Tensor, copies: Copies) -> Tensor:
    """``[T, H]``, the sum over each token's rows of ``[R, H]``, in the order of its routing."""
    return _combine(rows, *copies)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy[inverse], None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return rows[places].sum(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return dy[source], None, None


_permute: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permute.apply
_combine: Callable[[Tensor, Tensor, Tensor], Tensor] = _Combine.apply
