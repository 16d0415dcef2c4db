"""``deltatune::fp8_product``: opaque, so that a compiler chooses no other layout for operands that allow one alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._fp8_mm.providers import Fp8MmSpec
from deltatune.ops._opaque import opaque

__all__ = ["fp8_product"]


def _fake(
    rows: Tensor,
    _: Tensor,
    codes: Tensor,
    _scales: Tensor | None,
    _offsets: Tensor | None,
    _narrow: Tensor | None,
    _up: Tensor | None,
    dtype: torch.dtype,
    _impl: str,
) -> Tensor:
    return rows.new_empty(rows.shape[0], codes.shape[-2], dtype=dtype)


def _flops(
    rows: Sequence[int],
    _: object,
    codes: Sequence[int],
    _scales: object,
    _offsets: object,
    narrow: Sequence[int] | None,
    *__: object,
    **___: object,
) -> int:
    return 2 * rows[0] * codes[-2] * (rows[1] + (0 if narrow is None else narrow[1]))


@opaque(fake=_fake, flops=_flops, gradient_of="fp8_mm", remedy="detach its input")
def fp8_product(
    rows: Tensor,
    of_rows: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    offsets: Tensor | None,
    narrow: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """``[M, N]`` of codes ``[M, K]`` and ``[N, K]``, handed on as uint8, and their scales ``[M, 1]`` and ``[N, 1]``.

    With ``offsets`` of ``[G, N, K]`` and ``[G, N, 1]``; rows past the last group are whatever was there. ``narrow up``
    is added in the epilogue of that product: a compiler would copy this one, or read and write it once more.
    """
    if scales is None:
        scales = of_rows.new_ones(*codes.shape[:-1], 1)
    eight = torch.float8_e4m3fn
    y: Tensor = Fp8MmSpec.load(impl).product(rows.view(eight), of_rows, codes.view(eight), scales, offsets, dtype)
    return y if narrow is None or up is None else y.addmm_(narrow, up)
