"""``y = x W^T + s (x A^T) B^T`` for linear layers that share their input, adapters as part of the products.

With ``u = x cat(s A)^T``, one narrow product for all layers, and ``t = dy (s B)``::

    y = u B^T + x W^T      dx = t A + dy W      dA = t^T x      dB = dy^T u

The wide product adds to the narrow one in its epilogue, forward and backward.
"""

# M tokens, K input width, N output width, R rank, W columns of u (all adapters, those of a layer in whole 16s)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._lora_linear.op import lora_accumulate, lora_sum_products, lora_up_backward
from deltatune.ops._opaque import first_order_backward

__all__ = ["Adapter", "check_scales", "linear_with_lora", "low_rank", "noted_scales", "scaled"]

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


def linear_with_lora(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]]) -> list[Tensor]:
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
    # a view keeps the storage of this call where a tool gives the Parameter another (``.data = ...``) before backward
    saved = [*[weight.detach() for weight in weights], *[tensor.view_as(tensor) for tensor in (*down, *up)]]
    outputs = _apply(x.reshape(-1, x.shape[-1]), tuple(map(len, adapters)), scales, *saved)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def low_rank(x: Tensor, adapter: Adapter) -> Tensor:
    """``s (x A^T) B^T`` in the dtype of ``x``, as ``linear_with_lora`` without a weight."""
    return linear_with_lora(x, (), [[adapter]])[0]


def noted_scales(scales: Sequence[float]) -> Tensor | None:
    """What a forward scaled with, to be saved with its products: a checkpoint that recomputes these saves it anew."""
    return None if torch.compiler.is_compiling() else torch.tensor(scales, dtype=torch.float64, device="cpu")


def check_scales(op: str, noted: Tensor | None, scales: Sequence[float]) -> None:
    """Whether the products that backward has are those of the forward it belongs to.

    Raises:
        RuntimeError: they were recomputed at other scales.
    """
    if type(noted) is Tensor and noted.tolist() != list(scales):
        raise RuntimeError(
            f"{op}: the scale of an adapter was changed between a forward and its recomputation in backward, from "
            f"{list(scales)} to {noted.tolist()}; change it after backward"
        )


# From here on ``counts`` are the numbers of adapters of every layer; all adapters stand in a row, and so do their
# ``scales``. Plain loops: the compiler traces each instruction, for every layer with adapters.


def _parts(tensors: Sequence[Any], num_adapters: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Weights, A and B."""
    first = len(tensors) - 2 * num_adapters
    return tensors[:first], tensors[first : first + num_adapters], tensors[first + num_adapters :]


def _laid_out(
    counts: tuple[int, ...], down: list[Tensor], up: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[int], list[tuple[int, int]]]:
    """Of each layer ``A [W_i, K]``, ``B [N, W_i]`` and its first column of W; of each adapter its layer and column."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    offsets: list[int] = []
    places: list[tuple[int, int]] = []
    width = 0
    for count in counts:
        first, used = len(places), 0
        for a in down[first : first + count]:
            places.append((len(rows), used))
            used += a.shape[0]
        of_down, of_up = down[first : first + count], up[first : first + count]
        a, b = (of_down[0], of_up[0]) if count == 1 else (torch.cat(of_down), torch.cat(of_up, 1))
        if more := -used % _MULTIPLE:
            a, b = torch.constant_pad_nd(a, (0, 0, 0, more)), torch.constant_pad_nd(b, (0, more))
        rows.append(a)
        columns.append(b)
        offsets.append(width)
        width += used + more
    return rows, columns, offsets, places


def scaled(tensors: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """``tensor * scale`` of each, rounded once, to ``dtype``."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return [(x * scale).to(dtype) for x, scale in zip(wide, scales, strict=True)]


def _copied(*tensors: Tensor) -> list[Tensor]:
    """All of them in one buffer, which a compiler writes at once."""
    parts = torch.split(torch.cat([x.reshape(-1) for x in tensors]), [x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


class _LinearWithLora(torch.autograd.Function):
    # Dynamo takes a forward with as many parameters as arguments for one without ctx; there are always more arguments.
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        counts, scales, *tensors = rest
        weights, down, up = _parts(tensors, len(scales))
        parts, columns, offsets, _ = _laid_out(counts, scaled(down, scales, x.dtype), [b.to(x.dtype) for b in up])
        # a product of the library with [K, W] takes 27 us, with [W, K] 53 (H200, bf16, M = 16384, K = 2048, W = 64)
        across, *columns = _copied(torch.cat([a.mT for a in parts], 1), *columns)
        narrow = x @ across
        ctx.counts, ctx.scales = counts, scales
        ctx.save_for_backward(noted_scales(scales), x, narrow, *tensors)
        outputs = []
        for weight, b, at in zip(weights or (None,) * len(counts), columns, offsets, strict=True):
            u = narrow[:, at : at + b.shape[1]]
            outputs.append(u @ b.mT if weight is None else lora_accumulate(u, b.mT, [x], [weight.mT]))
        return tuple(outputs)

    @staticmethod
    @first_order_backward("linear_with_lora", remedy="detach its input and its adapters")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        noted, x, narrow, *tensors = ctx.saved_tensors
        check_scales("linear_with_lora", noted, ctx.scales)
        weights, down, up = _parts(tensors, len(ctx.scales))
        x_trains, _, _, *train = ctx.needs_input_grad
        _, down_trains, up_trains = map(any, _parts(train, len(ctx.scales)))
        parts, columns, offsets, places = _laid_out(
            ctx.counts, [a.to(x.dtype) for a in down], scaled(up, ctx.scales, x.dtype)
        )
        rows, *columns = _copied(torch.cat(parts), *columns)
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
        return dx, None, None, *(None,) * len(weights), *of_down, *of_up


_apply: Callable[..., tuple[Tensor, ...]] = _LinearWithLora.apply


def _input_gradient(rows: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], t: Tensor) -> Tensor:
    """``dx = t A + dy W``."""
    if not weights:
        return t @ rows
    # layers of a few outputs join the narrow product, where they cost nothing: no further pass over the result
    few: tuple[list[Tensor], list[Tensor]] = [t], [rows]
    rest: tuple[list[Tensor], list[Tensor]] = [], []
    for dy, weight in zip(grads, weights, strict=True):
        left, right = few if weight.shape[0] <= _FEW else rest
        left.append(dy)
        right.append(weight)
    first, to_it = (t, rows) if len(few[0]) == 1 else (torch.cat(few[0], dim=1), torch.cat(few[1]))
    return lora_accumulate(first, to_it, *rest)
