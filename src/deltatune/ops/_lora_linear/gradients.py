"""Gradients of layers with adapters, from what forward kept: ``t``, ``dx``, ``dA`` and ``dB``."""

# M tokens, K input width, N output width, W border width

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops._lora_linear.layout import Layout
from deltatune.ops._lora_linear.op import accumulate, fill_border, sum_products
from deltatune.ops._lora_linear.up_backward import fill_border_and_sum, up_backward

__all__ = ["Wanted", "adapter_gradients", "cast", "extend", "input_gradient"]

#: Outputs of a layer whose input gradient is computed with the adapters' of its group, such as Gated DeltaNet's gates:
#: alone, 16 columns of 2048 cost 82 us to add (H200, M = 16384, bf16), most of it passing over the result.
_FEW = 64


class Wanted(NamedTuple):
    """Whether anything wants the gradient of the input, of any A, of any B."""

    x: bool
    down: bool
    up: bool


def input_gradient(
    layout: Layout,
    grads: Sequence[Tensor],
    rows: Tensor,
    bordered: Sequence[Tensor],
    up: Sequence[Tensor],
    wanted: Wanted,
    narrow: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
    """``(dx, t [M, W], dy^T u of every target)``, None for what nothing wants.

    Args:
        layout: of the targets.
        grads: dy of every target.
        rows: ``A`` of all columns ``[W, K]``.
        bordered: of every target.
        up: ``s B`` of every target.
        wanted: what the caller wants.
        narrow: ``u`` ``[M, W]``; without it there are no ``dy^T u`` yet.
    """
    narrow = narrow if wanted.up else None
    if wanted.x and layout.backward_border:
        wide, t, sums = _border_products(layout, grads, up, narrow)
        products = [dy @ buffer[:, : layout.inner] for dy, buffer in zip(wide, bordered, strict=True)]
        return functools.reduce(torch.add, products), t, sums
    if wanted.x or wanted.down:
        t, sums = _narrow_products(layout, grads, up, narrow)
        return _added(layout, grads, t, rows, bordered) if wanted.x else None, t, sums
    return None, None, None


def adapter_gradients(
    layout: Layout,
    grads: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    t: Tensor | None,
    sums: Sequence[Tensor] | None,
    scale: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """``dA`` of every slot and then ``dB`` of every slot, None for what nothing wants; fp32 (fp64 for fp64).

    ``x`` is ``[M, K]``, ``narrow`` is ``u``; ``t`` and ``sums`` are what ``input_gradient`` gave.
    """
    none = (None,) * len(layout.slots)
    if sums is None and wanted.up:
        sums = [sum_products(dy, narrow[:, layout.used(number)]) for number, dy in enumerate(grads)]
    down = none if t is None or not wanted.down else _down_gradients(layout, t, x)
    up = none if sums is None else _up_gradients(layout, sums, scale)
    return (*down, *up)


def _border_products(
    layout: Layout, grads: Sequence[Tensor], up: Sequence[Tensor], narrow: Tensor | None
) -> tuple[list[Tensor], Tensor, list[Tensor] | None]:
    """``([dy | t] of every target, t [M, W] of all of them, dy^T u of every target)``; no sums without ``u``."""
    extended = [extend(dy, target.width) for dy, target in zip(grads, layout.targets, strict=True)]
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


def _added(layout: Layout, grads: Sequence[Tensor], t: Tensor, rows: Tensor, bordered: Sequence[Tensor]) -> Tensor:
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


def cast(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> tuple[Tensor | None, ...]:
    """Each gradient in its dtype."""
    return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def extend(x: Tensor, width: int) -> Tensor:
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
