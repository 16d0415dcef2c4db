"""``y = x W^T + s (x A^T) B^T`` for layers that share their input, as one matrix product for each of them.

With ``u = x A^T``, ``t = s dy B`` and bordered weights, base and adapter are one product forward and one backward::

    y = [x | u] [W | s B]^T      dx = [dy | t] [W; A]      dA = t^T x      dB = s dy^T u

Where the border would cost more than it saves, the narrow product is computed first and the wide one adds to it in its
epilogue: ``y = u (s B)^T + x W^T``, ``dx = t A + dy W``.
"""

# M tokens, K input width, N output width, W border width (all adapters of the group, padded), R rank

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._lora_linear.gradients import Wanted, adapter_gradients, cast, extend, input_gradient
from deltatune.ops._lora_linear.layout import Layout, Operands
from deltatune.ops._lora_linear.op import accumulate, fill_border

__all__ = ["linear_with_lora"]


def linear_with_lora(
    x: Tensor,
    operands: Operands,
    layout: Layout,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    *,
    numbers: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """``x W_i^T + sum_j s_j (x A_j^T) B_j^T`` for some targets i of a group.

    Values come from ``operands``; ``down`` and ``up`` only receive gradients, so the caller keeps the two the same. The
    weights are frozen and get none. The input is extended by its narrow products in a copy that a compiler writes in
    place of the input; a copy of its own otherwise.

    Args:
        x: ``[..., K]`` in the dtype of the operands.
        operands: of the whole group.
        layout: of the whole group.
        down: ``A [R, K]`` of every slot of the targets asked for, in the order of ``layout.slots``.
        up: ``B [N, R]``, likewise.
        numbers: which targets, ascending.

    Returns:
        ``[..., N_i]`` for each of them. Sums are fp32 inside a product (fp64 for fp64); ``u`` and ``t`` are rounded to
        the dtype of ``x``, gradients of A and B are fp32 sums cast to the dtype of A and B.

    Saved for backward: ``[x | u]`` with a forward border, else ``x`` and ``u``; the operands. Backward is of first
    order. Source: Hu et al., LoRA (2021); the folding into the base product is ours.
    """
    part = layout if len(numbers) == len(layout.targets) else layout.select(numbers)
    outputs = _apply(
        x.reshape(-1, layout.inner),
        part,
        operands.down,
        operands.rows,
        operands.scale,
        *(operands.bordered[number] for number in numbers),
        *(operands.up[number] for number in numbers),
        *down,
        *up,
    )
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _LinearWithLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, down: Tensor, rows: Tensor, scale: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        num = len(layout.targets)
        bordered, up, adapters = rest[:num], rest[num : 2 * num], rest[2 * num :]
        ctx.layout, ctx.dtypes = layout, tuple(adapter.dtype for adapter in adapters)
        weights = [buffer[: target.outer].mT for buffer, target in zip(bordered, layout.targets, strict=True)]
        if layout.forward_border:
            extended = extend(x, layout.width)
            fill_border(extended, down)
            ctx.save_for_backward(extended, rows, scale, *bordered, *up)
            return tuple(extended @ weight for weight in weights)
        narrow = x @ down
        ctx.save_for_backward(x, rows, scale, *bordered, *up, narrow)
        return tuple(
            accumulate(narrow[:, target.offset : target.offset + target.width], b.mT, [x], [weight])
            for target, b, weight in zip(layout.targets, up, weights, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        num, slots = len(layout.targets), len(layout.slots)
        x, rows, scale, *rest = ctx.saved_tensors
        bordered, up = rest[:num], rest[num : 2 * num]
        narrow = rest[2 * num] if len(rest) > 2 * num else x[:, layout.inner :]
        needed, first = ctx.needs_input_grad, 5 + 2 * num
        wanted = Wanted(needed[0], any(needed[first : first + slots]), any(needed[first + slots :]))
        dx, t, sums = input_gradient(layout, grads, rows, bordered, up, wanted, narrow)
        adapters = adapter_gradients(layout, grads, x[:, : layout.inner], narrow, t, sums, scale, wanted)
        return dx, *(None,) * (first - 1), *cast(adapters, ctx.dtypes)


_apply: Callable[..., tuple[Tensor, ...]] = _LinearWithLora.apply
