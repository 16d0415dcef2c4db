"""The gradients of layers with adapters, from those of their outputs::

t = dy (s B)      dx = t A + dy W      dA = t^T x      dB = dy^T u
"""

# M tokens, K input width, N output width, W columns of u

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from deltatune.ops._lora_linear.op import lora_accumulate, lora_sum_products, lora_up_backward
from deltatune.ops._lora_linear.operands import copied, laid_out, parts, scaled

__all__ = ["FEW", "gradients"]

#: Outputs of a layer whose input gradient is computed with the adapters' of all, such as Gated DeltaNet's gates: alone,
#: 16 columns of 2048 cost 82 us to add (H200, M = 16384, bf16), most of it passing over the result.
FEW: Final = 64


def gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    narrow: Tensor,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    scales: Sequence[float],
    trains: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``dx [M, K]``, and the gradients of ``tensors``; None of what does not train.

    Args:
        grads: ``dy [M, N]`` of every layer.
        x: ``[M, K]``.
        narrow: ``u [M, W]``.
        tensors: W of every layer, A and B of every adapter.
        counts: numbers of adapters of every layer.
        scales: of every adapter.
        trains: of x, and of ``tensors``.
    """
    weights, down, up = parts(tensors, len(scales))
    x_trains, *train = trains
    _, down_trains, up_trains = map(any, parts(train, len(scales)))
    pieces, columns, offsets, places = laid_out(counts, [a.to(x.dtype) for a in down], scaled(up, scales, x.dtype))
    rows, *columns = copied(torch.cat(pieces), *columns)
    t: Tensor | None = None
    sums: list[Tensor] = []
    if up_trains and (x_trains or down_trains):
        t, *sums = lora_up_backward(list(grads), columns, narrow, offsets, rows.shape[0])
    elif up_trains:
        for dy, b, at in zip(grads, columns, offsets, strict=True):
            sums.append(lora_sum_products(dy, narrow[:, at : at + b.shape[1]]))
    elif x_trains or down_trains:
        t = torch.cat([dy @ b for dy, b in zip(grads, columns, strict=True)], dim=1)
    products = lora_sum_products(t, x) if down_trains and t is not None else None
    of_down: list[Tensor | None] = []
    of_up: list[Tensor | None] = []
    for a, b, (layer, at) in zip(down, up, places, strict=True):
        part = None if products is None else products.narrow(0, offsets[layer] + at, a.shape[0])
        of_down.append(None if part is None else part.to(a.dtype))
        of_up.append(sums[layer].narrow(1, at, a.shape[0]).to(b.dtype) if sums else None)
    dx = _input_gradient(rows, weights, grads, t) if x_trains and t is not None else None
    return dx, [*[None] * len(weights), *of_down, *of_up]


def _input_gradient(rows: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], t: Tensor) -> Tensor:
    """``dx = t A + dy W``."""
    if not weights:
        return t @ rows
    # layers of a few outputs join the narrow product, where they cost nothing: no further pass over the result
    few: tuple[list[Tensor], list[Tensor]] = [t], [rows]
    rest: tuple[list[Tensor], list[Tensor]] = [], []
    for dy, weight in zip(grads, weights, strict=True):
        left, right = few if weight.shape[0] <= FEW else rest
        left.append(dy)
        right.append(weight)
    first, to_it = (t, rows) if len(few[0]) == 1 else (torch.cat(few[0], dim=1), torch.cat(few[1]))
    return lora_accumulate(first, to_it, *rest)
