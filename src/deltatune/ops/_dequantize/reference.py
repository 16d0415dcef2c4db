"""The values of quantised matrices in plain torch: the formulas of ``QuantizedWeight``, products in fp32.

    e2m1   bit 3 the sign, then 0, 0.5, 1, 1.5, 2, 3, 4, 6
    e4m3   torch's float8_e4m3fn: 0x7f and 0xff are NaN, the largest value is 448
    e8m0   torch's float8_e8m0fnu: 2^(byte - 127), 255 is NaN
    nf4    16 quantiles of a normal distribution between -1 and 1, of which one is 0

Source of nf4: QLoRA, arXiv 2305.14314; of e2m1 and e8m0: OCP Microscaling Formats 1.0.
"""

# G experts, N rows, K columns, S groups of values that share a scale, B blocks of 256 such scales, P parts of rows

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from deltatune.ops._dequantize.weight import BLOCK, GROUP, NESTED, shape_of

__all__ = ["E2M1", "NF4", "decode"]

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode(
    codes: Tensor,
    scales: Tensor,
    extra: Tensor | None,
    offsets: Tensor | None,
    format: str,
    divides: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``[..., N, K]`` of contiguous tensors, whose numbers of one byte are uint8.

    A matrix whose group has no rows is NaN: it shows if something reads it.
    """
    shape = shape_of(codes, format)
    if format == "fp8":
        values = _e4m3(codes) * _of_each_value(scales.to(torch.float32), shape)
    else:
        values = _unpacked(codes, format).view(*shape[:-2], -1, GROUP[format])
        values = (values * _of_each_group(scales, extra, format).unsqueeze(-1)).view(shape)
        if format == "nvfp4":
            assert extra is not None
            factor = extra.repeat_interleave(shape[-2] // extra.shape[-1], -1).unsqueeze(-1)
            values = values / factor if divides else values * factor
    y = values.to(dtype)
    if offsets is None:
        return y
    absent = offsets <= torch.cat([offsets.new_zeros(1), offsets[:-1]])
    return y.masked_fill(absent.view(-1, 1, 1), float("nan"))


def _unpacked(codes: Tensor, format: str) -> Tensor:
    """The values of both codes of every byte ``[..., N, K / 2, 2]``, in the order of columns."""
    values = NF4 if format == "nf4" else E2M1
    pairs = [(values[byte >> 4], values[byte & 15]) for byte in range(256)]
    if format != "nf4":
        pairs = [(low, high) for high, low in pairs]
    return torch.tensor(pairs).to(codes.device, non_blocking=True)[codes.int()]


def _e4m3(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def _of_each_group(scales: Tensor, extra: Tensor | None, format: str) -> Tensor:
    """``[..., S]`` in fp32, row by row."""
    if format == "mxfp4":
        return scales.view(torch.float8_e8m0fnu).to(torch.float32).flatten(-2)
    if format == "nvfp4":
        return _e4m3(scales).flatten(-2)
    assert extra is not None
    nested = extra[..., : -NESTED - 1].repeat_interleave(NESTED, -1)[..., : scales.shape[-1]]
    return extra[..., -NESTED - 1 : -1].gather(-1, scales.long()) * nested + extra[..., -1:]


def _of_each_value(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales ``[..., N, 1]``, or those of blocks as ``[..., N, K]``."""
    rows, columns = shape[-2:]
    if scales.shape[-2:] == (rows, 1):
        return scales
    wide = scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return wide.repeat_interleave(BLOCK, -2)[..., :rows, :]
