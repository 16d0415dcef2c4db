"""``s (x A^T) B^T`` beside a base product of its own, for layers whose weights cannot be bordered."""

# M tokens, K input width, N output width, R rank

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._lora_linear.op import sum_products
from deltatune.ops._lora_linear.up_backward import up_backward

__all__ = ["low_rank"]


def low_rank(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``scale * (x A^T) B^T`` in the dtype of ``x``.

    Args:
        x: ``[..., K]``.
        down: ``A [R, K]``, cast to the dtype of ``x``.
        up: ``B [N, R]``, cast likewise once it is scaled.
        scale: a number.

    Returns:
        ``[..., N]``. Gradients of A and B are fp32 sums (fp64 for fp64) cast to their dtypes. Saved for backward:
        ``x``, ``x A^T`` and the cast copies. Backward is of first order.
    """
    return _apply(x.reshape(-1, x.shape[-1]), down, up, scale).view(*x.shape[:-1], up.shape[0])


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        wide = torch.promote_types(up.dtype, torch.float32)
        down, up = down.to(x.dtype), (up.to(wide) * scale).to(x.dtype)
        narrow = x @ down.mT
        ctx.save_for_backward(x, narrow, down, up)
        return narrow @ up.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, down, up = ctx.saved_tensors
        x_trains, down_trains, up_trains, _ = ctx.needs_input_grad
        t: Tensor | None = None
        sums: Tensor | None = None
        if up_trains and (x_trains or down_trains):
            t, (sums,) = up_backward([dy], [up], narrow, [0], up.shape[1])
        elif up_trains:
            sums = sum_products(dy, narrow)
        else:
            t = dy @ up
        return (
            t @ down if x_trains and t is not None else None,
            sum_products(t, x).to(ctx.dtypes[0]) if down_trains and t is not None else None,
            None if sums is None else (sums * ctx.scale).to(ctx.dtypes[1]),
            None,
        )


_apply: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _LowRank.apply
