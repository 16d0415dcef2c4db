"""``deltatune::dequantize``: opaque, because which matrices have rows is data; no gradient, because they are frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._dequantize.providers import DequantizeSpec
from deltatune.ops._dequantize.weight import shape_of
from deltatune.ops._opaque import opaque

__all__ = ["dequantize"]


def _fake(
    codes: Tensor,
    _scales: Tensor,
    _extra: Tensor | None,
    _offsets: Tensor | None,
    format: str,
    _divides: bool,
    dtype: torch.dtype,
    _impl: str,
) -> Tensor:
    return codes.new_empty(shape_of(codes, format), dtype=dtype)


@opaque(fake=_fake, never_kept=True, remedy="freeze the weight")
def dequantize(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    offsets: Tensor | None,
    format: str,
    divides: bool,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """``[..., N, K]`` contiguous; ``api`` validates the inputs, and hands on numbers of one byte as uint8."""
    extra = None if extra is None else extra.contiguous()
    decode = DequantizeSpec.load(impl).decode
    y: Tensor = decode(codes.contiguous(), scales.contiguous(), extra, offsets, format, divides, dtype)
    return y
