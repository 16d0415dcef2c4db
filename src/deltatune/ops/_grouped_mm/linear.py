"""``y_r = W_g x_r + s B_g A_g x_r`` for the group g of row r, and its gradients.

With ``u_r = (s A_g) x_r`` and ``t_r = (s B_g)^T dy_r``::

    y_r = B_g u_r + W_g x_r    dx_r = A_g^T t_r + W_g^T dy_r    dA_g = sum t_r x_r^T    dB_g = sum dy_r u_r^T
"""

# R rows, G groups, K input width, N output width, S tokens that rows are copies of, k copies of each, W columns of u

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._grouped_mm.op import grouped_gram, grouped_mm
from deltatune.ops._lora_linear.api import Adapter, check_scales, noted_scales
from deltatune.ops._lora_linear.operands import scaled
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import first_order_backward

__all__ = ["Copies", "apply_grouped_linear", "columns_of", "live_rows"]

#: What tensor cores multiply at once.
_MULTIPLE: Final = 16
#: Implementations that leave the rows past the last group as they find them.
_LEAVES_ROWS: Final = ("torch", "quack")


class Copies(NamedTuple):
    """Rows that are copies of tokens: which token each of them copies, and where the copies of a token are."""

    source: Tensor  # [R] int64
    places: Tensor  # [S, k] int64


def apply_grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, adapters: Sequence[Adapter], impl: str, copies: Copies | None = None
) -> Tensor:
    """``[R, N]``; with ``copies`` x is ``[S, K]``, and row r stands for token ``source[r]``."""
    scales = tuple(adapter.scale for adapter in adapters)
    # views keep the storage of this call where a tool gives a Parameter another (``.data = ...``) before backward
    weight = weight.view_as(weight) if weight.requires_grad else weight.detach()
    factors = [tensor.view_as(tensor) for adapter in adapters for tensor in (adapter.down, adapter.up)]
    source, places = (None, None) if copies is None else copies
    return _apply(x, weight, offsets, source, places, scales, impl, *factors)


def live_rows(offsets: Tensor, rows: int) -> Tensor:
    """Whether a row belongs to a group ``[R, 1]``."""
    return (torch.arange(rows, device=offsets.device) < offsets[-1:]).unsqueeze(1)


def columns_of(factors: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """What a matrix has for each column, for rows: ``[1, N]`` of ``[N, 1]``; with offsets ``[R, N]`` of ``[G, N, 1]``.

    Absent rows have those of the last group.
    """
    if offsets is None:
        return factors.mT
    places = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    groups = torch.searchsorted(offsets, places, right=True).clamp(max=factors.shape[0] - 1)
    return factors.squeeze(-1)[groups]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        source, places, ctx.scales, ctx.impl, *factors = rest
        rows = x if source is None else x[source]
        u = up = None
        if factors:
            down, up = _joined(scaled(factors[::2], ctx.scales, x.dtype), _cast(factors[1::2], x.dtype))
            u = grouped_mm(rows, down, offsets, None, None, ctx.impl)
        x_trains, weight_trains, *_ = ctx.needs_input_grad
        keeps_x = weight_trains or any(ctx.needs_input_grad[7::2])
        kept = x if keeps_x else None, weight if x_trains else None
        noted = noted_scales(ctx.scales) if factors else None
        ctx.save_for_backward(noted, *kept, offsets, source, places, u, *factors)
        ctx.weight_dtype = weight.dtype
        return _product(rows, weight, offsets, u, up, ctx.impl)

    @staticmethod
    @first_order_backward("grouped_linear", remedy="detach its input and its adapters")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        noted, x, weight, offsets, source, places, u, *factors = ctx.saved_tensors
        check_scales("grouped_linear", noted, ctx.scales)
        x_trains, weight_trains, *_ = ctx.needs_input_grad
        downs, ups = factors[::2], factors[1::2]
        down_trains, up_trains = (any(ctx.needs_input_grad[first::2]) for first in (7, 8))
        wide, impl = accumulation_dtype(dy), ctx.impl
        rows = x if x is None or source is None else x[source]
        t = down = None
        if factors and (x_trains or down_trains):
            down, up = _joined(_cast(downs, dy.dtype), scaled(ups, ctx.scales, dy.dtype))
            t = grouped_mm(dy, up.mT, offsets, None, None, impl)
        dx = dweight = None
        if x_trains:
            dx = _product(dy, weight.mT, offsets, t, None if down is None else down.mT, impl)
            dx = dx if places is None else dx[places].sum(1)
        if weight_trains:
            dweight = grouped_gram(dy, rows, offsets, ctx.weight_dtype, impl)
        of_down = grouped_gram(t, rows, offsets, wide, impl) if down_trains else None
        of_up = grouped_gram(dy, u, offsets, wide, impl) if up_trains else None
        found: list[Tensor | None] = []
        at = 0
        for a, b in zip(downs, ups, strict=True):
            width = a.shape[1]
            found.append(None if of_down is None else of_down.narrow(1, at, width).to(a.dtype))
            found.append(None if of_up is None else of_up.narrow(2, at, width).to(b.dtype))
            at += width
        return dx, dweight, None, None, None, None, None, *found


_apply: Callable[..., Tensor] = _GroupedLinear.apply


def _product(x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None, impl: str) -> Tensor:
    y = grouped_mm(x, weight, offsets, narrow, up, impl)
    # a select: what was there may be NaN; in a graph it is part of what reads y
    return torch.where(live_rows(offsets, y.shape[0]), y, 0) if impl in _LEAVES_ROWS else y


def _joined(down: Sequence[Tensor], up: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``A [G, W, K]`` and ``B [G, N, W]`` of all adapters, the columns of u filled up to whole 16s."""
    a, b = (down[0], up[0]) if len(down) == 1 else (torch.cat(list(down), 1), torch.cat(list(up), 2))
    if more := -a.shape[1] % _MULTIPLE:
        a, b = torch.constant_pad_nd(a, (0, 0, 0, more)), torch.constant_pad_nd(b, (0, more))
    # PEFT's B has the experts innermost
    return a.contiguous(), b.contiguous()


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in tensors]
