"""The layer behind a gated activation: ``y = h W^T + s (h A^T) B^T`` for ``h = silu(gate) up``."""

# M tokens, K input width, N output width, W border width, R rank

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._lora_linear.gated_act import gated_act, swiglu_backward
from deltatune.ops._lora_linear.gradients import Wanted, adapter_gradients, cast, input_gradient
from deltatune.ops._lora_linear.layout import Layout, Operands

__all__ = ["gated_linear_with_lora"]


def gated_linear_with_lora(
    gate: Tensor,
    up: Tensor,
    operands: Operands,
    layout: Layout,
    adapters: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Tensor:
    """``linear_with_lora`` of ``silu(gate) * up`` for a layer alone in its group, whose input has a forward border.

    The activation's kernel computes ``u`` too, so that nothing reads h for it.

    Args:
        gate: ``[..., K]`` in the dtype of the operands.
        up: ``[..., K]``.
        operands: of the layer.
        layout: of the layer, with ``forward_border``.
        adapters: ``A [R, K]`` of every slot, and ``B [N, R]`` of every slot.

    Returns:
        ``[..., N]``. Saved for backward: gate, up and ``[h | u]``. Backward is of first order.
    """
    down, above = adapters
    y = _apply(
        gate.reshape(-1, layout.inner),
        up.reshape(-1, layout.inner),
        layout,
        operands.down,
        operands.rows,
        operands.scale,
        operands.bordered[0],
        operands.up[0],
        *down,
        *above,
    )
    return y.view(*gate.shape[:-1], y.shape[-1])


class _GatedLinearWithLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, layout: Layout, *rest: Tensor) -> Tensor:
        # Dynamo takes a forward with as many parameters as it has arguments for one without ctx: few have names here
        down, rows, scale, bordered, up_columns, *adapters = rest
        ctx.layout, ctx.dtypes = layout, tuple(adapter.dtype for adapter in adapters)
        used = layout.used(0)
        extended = gated_act(gate, up, down, used.stop - used.start)
        ctx.save_for_backward(gate, up, extended, rows, scale, bordered, up_columns)
        return extended @ bordered[: layout.targets[0].outer].mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        slots, needed = len(layout.slots), ctx.needs_input_grad
        gate, up, extended, rows, scale, bordered, up_columns = ctx.saved_tensors
        wanted = Wanted(needed[0] or needed[1], any(needed[8 : 8 + slots]), any(needed[8 + slots :]))
        h, narrow = extended[:, : layout.inner], extended[:, layout.inner :]
        dh, t, sums = input_gradient(layout, [dy], rows, [bordered], [up_columns], wanted, narrow)
        dgate, dup = (None, None) if dh is None else swiglu_backward(dh, gate, up)
        adapters = adapter_gradients(layout, [dy], h, narrow, t, sums, scale, wanted)
        return dgate, dup, *(None,) * 6, *cast(adapters, ctx.dtypes)


_apply: Callable[..., Tensor] = _GatedLinearWithLora.apply
