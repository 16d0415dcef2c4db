"""``y = x W^T + s (x A^T) B^T`` for layers that share their input, as one matrix product for each of them.

With ``u = x A^T``, ``t = s dy B`` and bordered weights, base and adapter are one product forward and one backward::

    y = [x | u] [W | s B]^T      dx = [dy | t] [W; A]      dA = t^T x      dB = s dy^T u

Where the border would cost more than it saves, the narrow product is computed first and the wide one adds to it in its
epilogue: ``y = u (s B)^T + x W^T``, ``dx = t A + dy W``.
"""

# M tokens, K input width, N output width, W border width (all adapters of the group, padded), R rank

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._lora_linear.op import accumulate, fill_border, sum_products
from deltatune.ops._lora_linear.up_backward import fill_border_and_sum, up_backward

__all__ = ["Layout", "Operands", "Slot", "Target", "linear_with_lora"]


#: Outputs of a layer whose input gradient is computed with the adapters' of its group, such as Gated DeltaNet's gates:
#: alone, 16 columns of 2048 cost 82 us to add (H200, M = 16384, bf16), most of it passing over the result.
_FEW = 64
#: A target's columns that adapters use are read in whole multiples of this: what tensor cores multiply at once.
_MULTIPLE = 16


class Target(NamedTuple):
    """One linear layer of a group: its output width, and its columns of the border."""

    outer: int
    offset: int
    width: int


class Slot(NamedTuple):
    """One adapter: the number of its layer among the targets, its first column of the border, and its rank."""

    target: int
    offset: int
    rank: int


class Layout(NamedTuple):
    """What a group of layers looks like: integers alone, the same for every decoder layer of a type.

    Attributes:
        inner: K, the width of the input that the layers share.
        width: W, the columns of the border; those that no adapter uses are zero.
        forward_border: whether forward is one product with ``[W | s B]``, or one that adds to the narrow product.
        backward_border: the same for backward and ``[W; A]``.
        targets: the layers.
        slots: the adapters.
    """

    inner: int
    width: int
    forward_border: bool
    backward_border: bool
    targets: tuple[Target, ...]
    slots: tuple[Slot, ...]

    def select(self, numbers: tuple[int, ...]) -> Layout:
        """The layout of some of the targets."""
        targets = tuple(self.targets[number] for number in numbers)
        slots = tuple(
            Slot(numbers.index(slot.target), slot.offset, slot.rank) for slot in self.slots if slot.target in numbers
        )
        return self._replace(targets=targets, slots=slots)

    def used(self, number: int) -> slice:
        """The columns of a target up to its last adapter, padded as the tensor cores need them."""
        target = self.targets[number]
        ends = [slot.offset + slot.rank - target.offset for slot in self.slots if slot.target == number]
        return slice(target.offset, target.offset + min(-(-ends[-1] // _MULTIPLE) * _MULTIPLE, target.width))


@dataclass(frozen=True, eq=False)
class Operands:
    """Copies of the adapters in the compute dtype, laid out for the products, beside the frozen weights.

    Attributes:
        down: ``[K, W]``, the columns of ``A^T`` of all adapters.
        rows: ``[W, K]``, the same transposed.
        scale: fp32 ``[W]``, the scaling of the adapter that owns a column.
        bordered: a target's ``[[W, s B], [A, 0]]`` ``[N + width, K + W]``, without the columns where the layout has no
            forward border and without the rows where it has no backward border.
        up: a target's ``s B`` ``[N, width]``.
    """

    down: Tensor
    rows: Tensor
    scale: Tensor
    bordered: tuple[Tensor, ...]
    up: tuple[Tensor, ...]


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
            extended = _extend(x, layout.width)
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
        narrow = rest[2 * num] if len(rest) > 2 * num else x[:, layout.inner :]
        first = 5 + 2 * num
        x_trains, down_trains = ctx.needs_input_grad[0], any(ctx.needs_input_grad[first : first + slots])
        up_trains = any(ctx.needs_input_grad[first + slots :])
        t, dx, sums = None, None, None
        if x_trains and layout.backward_border:
            wide, t, sums = _border_products(layout, grads, rest[num : 2 * num], narrow if up_trains else None)
            dx = _sum([dy @ buffer[:, : layout.inner] for dy, buffer in zip(wide, rest[:num], strict=True)])
        elif x_trains or down_trains:
            t, sums = _narrow_products(layout, grads, rest[num : 2 * num], narrow if up_trains else None)
            dx = _input_gradient(layout, grads, t, rows, rest[:num]) if x_trains else None
        elif up_trains:
            sums = [sum_products(dy, narrow[:, layout.used(number)]) for number, dy in enumerate(grads)]
        down = (None,) * slots if t is None or not down_trains else _down_gradients(layout, t, x[:, : layout.inner])
        up = (None,) * slots if sums is None else _up_gradients(layout, sums, scale)
        adapters = (
            None if grad is None else grad.to(dtype) for grad, dtype in zip((*down, *up), ctx.dtypes, strict=True)
        )
        return dx, *(None,) * (first - 1), *adapters


def _border_products(
    layout: Layout, grads: Sequence[Tensor], up: Sequence[Tensor], narrow: Tensor | None
) -> tuple[list[Tensor], Tensor, list[Tensor] | None]:
    """``([dy | t] of every target, t [M, W] of all of them, dy^T u of every target)``; no sums without ``u``."""
    extended = [_extend(dy, target.width) for dy, target in zip(grads, layout.targets, strict=True)]
    sums: list[Tensor] | None = None
    if narrow is None:
        for dy, b in zip(extended, up, strict=True):
            fill_border(dy, b)
    else:
        used = [layout.used(number) for number in range(len(extended))]
        sums = [
            fill_border_and_sum(dy, b[:, : columns.stop - columns.start], narrow[:, columns])
            for dy, b, columns in zip(extended, up, used, strict=True)
        ]
    parts = [dy[:, target.outer :] for dy, target in zip(extended, layout.targets, strict=True)]
    return extended, _join(layout, parts), sums


def _narrow_products(
    layout: Layout, grads: Sequence[Tensor], up: Sequence[Tensor], narrow: Tensor | None
) -> tuple[Tensor, list[Tensor] | None]:
    """``(t [M, W] of all targets, dy^T u of every target)``; no sums without ``u``."""
    if narrow is None:
        return _join(layout, [dy @ b for dy, b in zip(grads, up, strict=True)]), None
    used = [layout.used(number) for number in range(len(grads))]
    columns = [b[:, : column.stop - column.start] for b, column in zip(up, used, strict=True)]
    return up_backward(grads, columns, narrow, [column.start for column in used], layout.width)


def _input_gradient(
    layout: Layout, grads: Sequence[Tensor], t: Tensor, rows: Tensor, bordered: Sequence[Tensor]
) -> Tensor:
    """``dx = t A + dy W``."""
    frozen = [buffer[: target.outer, : layout.inner] for buffer, target in zip(bordered, layout.targets, strict=True)]
    few = [number for number, target in enumerate(layout.targets) if target.outer <= _FEW]
    first, to_it = t, rows
    if few:
        # layers of a few outputs join the narrow product, where they cost nothing: no further pass over the result
        first = torch.cat([t, *(grads[number] for number in few)], dim=1)
        to_it = torch.cat([rows, *(frozen[number] for number in few)], dim=0)
    rest = [number for number in range(len(frozen)) if number not in few]
    return accumulate(first, to_it, [grads[i] for i in rest], [frozen[i] for i in rest])


def _down_gradients(layout: Layout, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """``dA = t^T x`` of every slot."""
    products = sum_products(t, x)
    return tuple(products[slot.offset : slot.offset + slot.rank] for slot in layout.slots)


def _up_gradients(layout: Layout, sums: Sequence[Tensor], scale: Tensor) -> tuple[Tensor, ...]:
    """``dB = s dy^T u`` of every slot."""
    found = []
    for slot in layout.slots:
        first = slot.offset - layout.targets[slot.target].offset
        columns = slice(slot.offset, slot.offset + slot.rank)
        found.append(sums[slot.target][:, first : first + slot.rank] * scale[columns])
    return tuple(found)


def _extend(x: Tensor, width: int) -> Tensor:
    """``[x | 0]``: Inductor writes what computes ``x`` straight into it."""
    return torch.cat([x, x.new_zeros(x.shape[0], width)], dim=1)


def _join(layout: Layout, parts: Sequence[Tensor]) -> Tensor:
    """The targets' columns side by side, zeros between and behind them, ``[M, W]``."""
    columns, place = [], 0
    for part, target in zip(parts, layout.targets, strict=True):
        if target.offset > place:
            columns.append(part.new_zeros(part.shape[0], target.offset - place))
        columns.append(part)
        place = target.offset + target.width
    if place < layout.width:
        columns.append(parts[0].new_zeros(parts[0].shape[0], layout.width - place))
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _sum(products: Sequence[Tensor]) -> Tensor:
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


_apply: Callable[..., tuple[Tensor, ...]] = _LinearWithLora.apply
