"""The two opaque products of grouped rows: a group's rows with its matrix, and a group's rows with each other.

Opaque, because the rows of a group are data. Their gradients are ``linear.py``'s.
"""

# R rows, G groups, K input width, N output width, W width of the narrow rows

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._opaque import opaque

__all__ = ["grouped_gram", "grouped_mm"]

_REMEDY = "detach its input"


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    _: object,
    narrow: Sequence[int] | None,
    *__: object,
    **___: object,
) -> int:
    return 2 * x_shape[0] * weight_shape[1] * (x_shape[1] + (narrow[1] if narrow is not None else 0))


@opaque(fake=_fake, flops=_flops, gradient_of="grouped_linear", remedy=_REMEDY)
def grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, narrow: Tensor | None, up: Tensor | None, impl: str
) -> Tensor:
    """``weight_g x_r (+ up_g narrow_r)`` ``[R, N]`` for x ``[R, K]``, weight ``[G, N, K]``, up ``[G, N, W]``.

    Rows past the last group are zero, or with ``impl="torch"`` or ``"quack"`` whatever was there.
    """
    y: Tensor = GroupedMmSpec.load(impl).product(x, weight, offsets, narrow, up)
    return y


def _gram_fake(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype, _impl: str) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1], dtype=dtype)


def _gram_flops(left_shape: Sequence[int], right_shape: Sequence[int], *_: object, **__: object) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


# rows are copies of tokens, or a gate of what is kept: k times as large as what they are made of
@opaque(fake=_gram_fake, flops=_gram_flops, rebuilt=(0, 1), gradient_of="grouped_linear", remedy="freeze its weight")
def grouped_gram(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """``sum over the rows of g of left_r right_r^T`` ``[G, P, Q]`` for left ``[R, P]``, right ``[R, Q]``.

    Summed in fp32 (fp64 for fp64), given in ``dtype``; zero for a group without rows.
    """
    sums: Tensor = GroupedMmSpec.load(impl).gram(left, right, offsets, dtype)
    return sums
