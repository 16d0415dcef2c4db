"""The products of ``linear_with_lora`` that autograd and Inductor do not see into: schema, kernels, fakes, FLOPs.

They are opaque where plain torch would copy: a product written into columns of a larger tensor, a product that adds to
what is there, and one that keeps its fp32 sums. All run on the device's own matrix library.
"""

# M tokens, K input width, N output width, W border width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast

__all__ = ["accumulate", "fill_border", "sum_dtype", "sum_products"]

torch.library.define("deltatune::lora_fill_border", "(Tensor(a!) extended, Tensor weight) -> ()")
torch.library.define(
    "deltatune::lora_accumulate", "(Tensor narrow, Tensor up, Tensor[] inputs, Tensor[] weights) -> Tensor"
)
torch.library.define("deltatune::lora_sum_products", "(Tensor left, Tensor right) -> Tensor")


def fill_border(extended: Tensor, weight: Tensor) -> None:
    """``extended[:, K:] = extended[:, :K] @ weight`` in place, for extended ``[M, K + W]`` and weight ``[K, W]``."""
    torch.ops.deltatune.lora_fill_border(extended, weight)


def accumulate(narrow: Tensor, up: Tensor, inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """``narrow @ up + sum_i inputs_i @ weights_i``, each product added in the epilogue of its own matrix product.

    The first one is rounded to the output's dtype before the others are added to it. Its size is that of the output
    whatever the inner width, so the narrow one comes first: the wide ones then read what it wrote, in their epilogue.
    """
    summed: Tensor = torch.ops.deltatune.lora_accumulate(narrow, up, inputs, weights)
    return summed


def sum_products(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` over all tokens, ``[M, P], [M, Q] -> [P, Q]``: fp32 sums kept in fp32, fp64 for fp64."""
    products: Tensor = torch.ops.deltatune.lora_sum_products(left, right)
    return products


def _fill_border(extended: Tensor, weight: Tensor) -> None:
    inner = weight.shape[0]
    with without_autocast(extended):
        torch.mm(extended[:, :inner], weight, out=extended[:, inner:])


def _accumulate(narrow: Tensor, up: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    with without_autocast(narrow):
        summed = torch.mm(narrow, up)
        for x, weight in zip(inputs, weights, strict=True):
            summed.addmm_(x, weight)
    return summed


def _sum_products(left: Tensor, right: Tensor) -> Tensor:
    wide = sum_dtype(left)
    with without_autocast(left):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(left.mT, right, out_dtype=wide)
        return torch.mm(left.mT.to(wide), right.to(wide))


def sum_dtype(x: Tensor) -> torch.dtype:
    """What products of 16-bit and fp32 numbers are summed and kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fill_border_fake(extended: Tensor, weight: Tensor) -> None:
    assert extended.shape[1] == sum(weight.shape), "the border is as wide as its weight"


def _accumulate_fake(narrow: Tensor, up: Tensor, *_: object) -> Tensor:
    return narrow.new_empty(narrow.shape[0], up.shape[1])


def _sum_products_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=sum_dtype(left))


for _name, _kernel, _fake in (
    ("fill_border", _fill_border, _fill_border_fake),
    ("accumulate", _accumulate, _accumulate_fake),
    ("sum_products", _sum_products, _sum_products_fake),
):
    torch.library.impl(f"deltatune::lora_{_name}", "CompositeExplicitAutograd", _kernel)
    torch.library.register_fake(f"deltatune::lora_{_name}", _fake)


@register_flop_formula(torch.ops.deltatune.lora_fill_border)
def _fill_border_flops(extended_shape: Sequence[int], weight_shape: Sequence[int], **_: Any) -> int:
    return 2 * extended_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.deltatune.lora_accumulate)
def _accumulate_flops(
    narrow_shape: Sequence[int], up_shape: Sequence[int], _inputs: object, weights: Sequence[Sequence[int]], **_: Any
) -> int:
    return 2 * narrow_shape[0] * sum(inner * outer for inner, outer in (up_shape, *weights))


@register_flop_formula(torch.ops.deltatune.lora_sum_products)
def _sum_products_flops(left_shape: Sequence[int], right_shape: Sequence[int], **_: Any) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]
