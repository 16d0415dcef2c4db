"""``y = x W^T + s (x A^T) B^T`` for linear layers that share their input, adapters as part of the products.

With ``u = x cat(A)^T``, one narrow product for all layers, and ``t = s dy B``::

    y = u (s B)^T + x W^T      dx = t A + dy W      dA = t^T x      dB = s dy^T u

The wide product adds to the narrow one in its epilogue, forward and backward.
"""

# M tokens, K input width, N output width, R rank, W columns of u (all adapters, those of a layer in whole 16s)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltatune.ops._lora_linear.op import lora_accumulate, lora_narrow_product, lora_sum_products, lora_up_backward
from deltatune.ops._opaque import first_order_backward

__all__ = ["Adapter", "linear_with_lora", "low_rank"]

#: What tensor cores multiply at once.
_MULTIPLE: Final = 16
#: Outputs of a layer whose input gradient is computed with the adapters' of all, such as Gated DeltaNet's gates: alone,
#: 16 columns of 2048 cost 82 us to add (H200, M = 16384, bf16), most of it passing over the result.
_FEW: Final = 64


class Adapter(NamedTuple):
    """``A [R, K]``, ``B [N, R]`` and what their product is multiplied with."""

    down: Tensor
    up: Tensor
    scale: float


def linear_with_lora(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]) -> tuple[Tensor, ...]:
    """``x W_i^T + sum_j s_ij (x A_ij^T) B_ij^T`` of every layer i.

    Args:
        x: ``[..., K]``, in the dtype of the weights.
        weights: ``W [N, K]`` of every layer, frozen: they get no gradient. None at all: the low-rank products alone.
        adapters: of every layer, one at least; in any floating dtype, cast to that of ``x`` for the products.

    Returns:
        ``[..., N_i]`` of each layer. Sums are fp32 inside a product (fp64 for fp64); ``u`` and ``t`` are rounded to the
        dtype of ``x``; gradients of A and B are fp32 sums cast to the dtypes of A and B.

    Saved for backward: ``x``, ``u``, and the weights, A and B themselves, so that torch refuses a backward after one of
    them was written to. Backward is of first order. Source: Hu et al., LoRA (2021).
    """
    down, up, scales = zip(*(adapter for of_layer in adapters for adapter in of_layer), strict=True)
    layout = _Layout(len(weights), tuple(map(len, adapters)), scales)
    # a view keeps the storage of this call where a tool gives the Parameter another (``.data = ...``) before backward
    saved = [*(weight.detach() for weight in weights), *(tensor.view_as(tensor) for tensor in (*down, *up))]
    outputs = _apply(x.reshape(-1, x.shape[-1]), layout, *saved)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def low_rank(x: Tensor, adapter: Adapter) -> Tensor:
    """``s (x A^T) B^T`` in the dtype of ``x``, as ``linear_with_lora`` without a weight."""
    return linear_with_lora(x, (), [[adapter]])[0]


class _Layout(NamedTuple):
    """How the tensors of a call are laid out: how many weights, adapters of every layer, scales of all adapters."""

    weights: int
    counts: tuple[int, ...]
    scales: tuple[float, ...]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Weights, A and B."""
        first = self.weights + len(self.scales)
        return tensors[: self.weights], tensors[self.weights : first], tensors[first:]


class _Operands(NamedTuple):
    """What the products take: ``A [W, K]``, ``s B [N, W_i]`` of every layer, weights, first columns and W."""

    rows: Tensor
    up: list[Tensor]
    weights: Sequence[Tensor]
    offsets: list[int]
    width: int

    def columns(self, narrow: Tensor) -> list[Tensor]:
        """A layer's columns of ``[M, W]``, of every layer."""
        return [narrow[:, at : at + b.shape[1]] for at, b in zip(self.offsets, self.up, strict=True)]


def _layers(layout: _Layout, of_adapters: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """What belongs to the adapters of each layer."""
    first = 0
    for count in layout.counts:
        yield of_adapters[first : first + count]
        first += count


def _operands(layout: _Layout, tensors: Sequence[Tensor], dtype: torch.dtype) -> _Operands:
    weights, down, up = layout.parts(tensors)
    rows, columns, offsets, place = [], [], [], 0
    for of_down, of_up, scales in zip(
        _layers(layout, down), _layers(layout, up), _layers(layout, layout.scales), strict=True
    ):
        used = sum(a.shape[0] for a in of_down)
        more = -used % _MULTIPLE
        rows.append(_joined([a.to(dtype) for a in of_down], 0, (0, 0, 0, more)))
        columns.append(_joined([_scaled(b, s, dtype) for b, s in zip(of_up, scales, strict=True)], 1, (0, more)))
        offsets.append(place)
        place += used + more
    return _Operands(rows[0] if len(rows) == 1 else torch.cat(rows), columns, weights, offsets, place)


def _joined(parts: list[Tensor], dim: int, more: tuple[int, ...]) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return pad(joined, more) if any(more) else joined


def _scaled(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (up.to(torch.promote_types(up.dtype, torch.float32)) * scale).to(dtype)


class _LinearWithLora(torch.autograd.Function):
    # Dynamo takes a forward with as many parameters as arguments for one without ctx; there are always more arguments.
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        layout, *tensors = rest
        operands = _operands(layout, tensors, x.dtype)
        narrow = lora_narrow_product(x, operands.rows)
        ctx.layout = layout
        ctx.save_for_backward(x, narrow, *tensors)
        parts = zip(operands.columns(narrow), operands.up, strict=True)
        if not layout.weights:
            return tuple(u @ b.mT for u, b in parts)
        return tuple(
            lora_accumulate(u, b.mT, [x], [weight.mT]) for (u, b), weight in zip(parts, operands.weights, strict=True)
        )

    @staticmethod
    @first_order_backward("linear_with_lora", remedy="detach its input and its adapters")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        x, narrow, *tensors = ctx.saved_tensors
        _, down, up = layout.parts(tensors)
        _, down_trains, up_trains = map(any, layout.parts(ctx.needs_input_grad[2:]))
        x_trains = ctx.needs_input_grad[0]
        operands = _operands(layout, tensors, x.dtype)
        t: Tensor | None = None
        sums: list[Tensor] = []
        if up_trains and (x_trains or down_trains):
            t, *sums = lora_up_backward(list(grads), operands.up, narrow, operands.offsets, operands.width)
        elif up_trains:
            sums = [lora_sum_products(dy, u) for dy, u in zip(grads, operands.columns(narrow), strict=True)]
        elif x_trains or down_trains:
            t = torch.cat([dy @ b for dy, b in zip(grads, operands.up, strict=True)], dim=1)
        found: list[Tensor | None] = [None] * (2 * len(down))
        if down_trains and t is not None:
            products = lora_sum_products(t, x)
            parts = _of_adapters(layout, [products[at:] for at in operands.offsets], down, 0)
            found[: len(down)] = [part.to(a.dtype) for part, a in zip(parts, down, strict=True)]
        if up_trains:
            parts = _of_adapters(layout, sums, up, 1)
            found[len(down) :] = [(p * scale).to(b.dtype) for p, scale, b in zip(parts, layout.scales, up, strict=True)]
        dx = _input_gradient(operands, grads, t) if x_trains and t is not None else None
        return dx, None, *(None,) * layout.weights, *found


_apply: Callable[..., tuple[Tensor, ...]] = _LinearWithLora.apply


def _input_gradient(operands: _Operands, grads: Sequence[Tensor], t: Tensor) -> Tensor:
    """``dx = t A + dy W``."""
    if not operands.weights:
        return t @ operands.rows
    pairs = list(zip(grads, operands.weights, strict=True))
    few = [pair for pair in pairs if pair[1].shape[0] <= _FEW]
    rest = [pair for pair in pairs if pair[1].shape[0] > _FEW]
    first, to_it = t, operands.rows
    if few:
        # layers of a few outputs join the narrow product, where they cost nothing: no further pass over the result
        first = torch.cat([t, *(dy for dy, _ in few)], dim=1)
        to_it = torch.cat([to_it, *(weight for _, weight in few)])
    return lora_accumulate(first, to_it, [dy for dy, _ in rest], [weight for _, weight in rest])


def _of_adapters(layout: _Layout, products: Sequence[Tensor], adapters: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Every adapter's part of its layer's products, the ranks along ``dim``; what is behind them is padding."""
    found: list[Tensor] = []
    for of_layer, whole in zip(_layers(layout, adapters), products, strict=True):
        ranks = [x.shape[dim] for x in of_layer]
        found += torch.split(whole.narrow(dim, 0, sum(ranks)), ranks, dim)
    return found
