"""The products of ``linear_with_lora`` that autograd and Inductor do not see into: schema, kernels, fakes, FLOPs.

They are opaque where a compiler would choose another layout or pass over the output again: a narrow product, one that
adds to what is there, and one that keeps its fp32 sums. All run on the device's own matrix library.
"""

# M tokens, K input width, N output width, W columns of all adapters

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._numerics import accumulation_dtype

__all__ = ["accumulate", "narrow_product", "sum_products"]

torch.library.define("deltatune::lora_narrow_product", "(Tensor x, Tensor rows) -> Tensor")
torch.library.define(
    "deltatune::lora_accumulate", "(Tensor narrow, Tensor up, Tensor[] inputs, Tensor[] weights) -> Tensor"
)
torch.library.define("deltatune::lora_sum_products", "(Tensor left, Tensor right) -> Tensor")


def narrow_product(x: Tensor, rows: Tensor) -> Tensor:
    """``x rows^T``, ``[M, K], [W, K] -> [M, W]``."""
    product: Tensor = torch.ops.deltatune.lora_narrow_product(x, rows)
    return product


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


def _narrow_product(x: Tensor, rows: Tensor) -> Tensor:
    with without_autocast(x):
        # the library's product takes 27 us with [K, W], 53 with [W, K] (H200, bf16, M = 16384, K = 2048, W = 64)
        return torch.mm(x, rows.mT.contiguous() if x.is_cuda else rows.mT)


def _accumulate(narrow: Tensor, up: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    with without_autocast(narrow):
        summed = torch.mm(narrow, up)
        for x, weight in zip(inputs, weights, strict=True):
            summed.addmm_(x, weight)
    return summed


def _sum_products(left: Tensor, right: Tensor) -> Tensor:
    wide = accumulation_dtype(left)
    with without_autocast(left):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(left.mT, right, out_dtype=wide)
        return torch.mm(left.mT.to(wide), right.to(wide))


def _narrow_product_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


def _accumulate_fake(narrow: Tensor, up: Tensor, *_: object) -> Tensor:
    return narrow.new_empty(narrow.shape[0], up.shape[1])


def _sum_products_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=accumulation_dtype(left))


for _name, _kernel, _fake in (
    ("narrow_product", _narrow_product, _narrow_product_fake),
    ("accumulate", _accumulate, _accumulate_fake),
    ("sum_products", _sum_products, _sum_products_fake),
):
    torch.library.impl(f"deltatune::lora_{_name}", "CompositeExplicitAutograd", _kernel)
    torch.library.register_fake(f"deltatune::lora_{_name}", _fake)


@register_flop_formula(torch.ops.deltatune.lora_narrow_product)
def _narrow_product_flops(x_shape: Sequence[int], rows_shape: Sequence[int], **_: Any) -> int:
    return 2 * x_shape[0] * rows_shape[0] * rows_shape[1]


@register_flop_formula(torch.ops.deltatune.lora_accumulate)
def _accumulate_flops(
    narrow_shape: Sequence[int], up_shape: Sequence[int], _inputs: object, weights: Sequence[Sequence[int]], **_: Any
) -> int:
    return 2 * narrow_shape[0] * sum(inner * outer for inner, outer in (up_shape, *weights))


@register_flop_formula(torch.ops.deltatune.lora_sum_products)
def _sum_products_flops(left_shape: Sequence[int], right_shape: Sequence[int], **_: Any) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]
