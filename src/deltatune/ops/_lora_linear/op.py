"""The products of ``linear_with_lora`` that are opaque to the compiler: narrow, accumulated, summed in fp32.

They are opaque where a compiler would choose another layout or pass over the output again: a narrow product, one that
adds to what is there, and one that keeps its fp32 sums. All run on the device's own matrix library.
"""

# M tokens, K input width, N output width, W columns of all adapters

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque

__all__ = ["lora_accumulate", "lora_narrow_product", "lora_sum_products"]


def _narrow_fake(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


def _narrow_flops(x_shape: Sequence[int], rows_shape: Sequence[int], **_: object) -> int:
    return 2 * x_shape[0] * rows_shape[0] * rows_shape[1]


@opaque(fake=_narrow_fake, flops=_narrow_flops)
def lora_narrow_product(x: Tensor, rows: Tensor) -> Tensor:
    """``x rows^T``, ``[M, K], [W, K] -> [M, W]``."""
    # the library's product takes 27 us with [K, W], 53 with [W, K] (H200, bf16, M = 16384, K = 2048, W = 64)
    return torch.mm(x, rows.mT.contiguous() if x.is_cuda else rows.mT)


def _accumulate_fake(narrow: Tensor, up: Tensor, *_: object) -> Tensor:
    return narrow.new_empty(narrow.shape[0], up.shape[1])


def _accumulate_flops(
    narrow_shape: Sequence[int], up_shape: Sequence[int], _: object, weights: Sequence[Sequence[int]], **__: object
) -> int:
    return 2 * narrow_shape[0] * sum(inner * outer for inner, outer in (up_shape, *weights))


@opaque(fake=_accumulate_fake, flops=_accumulate_flops)
def lora_accumulate(narrow: Tensor, up: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``narrow @ up + sum_i inputs_i @ weights_i``, each product added in the epilogue of its own matrix product.

    The first one is rounded to the output's dtype before the others are added to it. Its size is that of the output
    whatever the inner width, so the narrow one comes first: the wide ones then read what it wrote, in their epilogue.
    """
    summed = torch.mm(narrow, up)
    for x, weight in zip(inputs, weights, strict=True):
        summed.addmm_(x, weight)
    return summed


def _sum_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=accumulation_dtype(left))


def _sum_flops(left_shape: Sequence[int], right_shape: Sequence[int], **_: object) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


@opaque(fake=_sum_fake, flops=_sum_flops)
def lora_sum_products(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` over all tokens, ``[M, P], [M, Q] -> [P, Q]``: fp32 sums kept in fp32, fp64 for fp64."""
    wide = accumulation_dtype(left)
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.mT, right, out_dtype=wide)
    return torch.mm(left.mT.to(wide), right.to(wide))
