"""Quantised matrices that hold every byte, and their values by the formulas, one after the other in Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltatune.ops import QuantizedWeight

__all__ = ["CASES", "case", "finite", "same", "value_by_value"]

#: name -> format, leading dims, rows, columns, and how values are scaled where a format knows several ways
CASES: dict[str, tuple[str, tuple[int, ...], int, int, str]] = {
    "nf4": ("nf4", (), 256, 128, ""),
    "nf4, blocks over the ends of rows": ("nf4", (), 64, 6, ""),
    "nf4, experts": ("nf4", (3,), 8, 72, ""),
    "mxfp4": ("mxfp4", (), 256, 64, ""),
    "mxfp4, experts": ("mxfp4", (3,), 5, 96, ""),
    "nvfp4": ("nvfp4", (), 16, 256, "1"),
    "nvfp4, gate and up": ("nvfp4", (3,), 6, 80, "2"),
    "nvfp4, divided": ("nvfp4", (), 16, 256, "1 /"),
    "nvfp4, gate and up, divided": ("nvfp4", (2,), 6, 48, "2 /"),
    "fp8, channels": ("fp8", (), 16, 48, "channels"),
    "fp8, one row": ("fp8", (2,), 1, 130, "blocks"),
    "fp8, blocks": ("fp8", (), 256, 128, "blocks"),
    "fp8, ragged blocks": ("fp8", (2,), 130, 140, "blocks"),
    "fp8, ragged channels in bf16": ("fp8", (2,), 3, 333, "channels bf16"),
}


def case(name: str, device: str = "cpu") -> QuantizedWeight:
    """A weight of ``CASES``; its codes run through all bytes, as do scales of one byte where there are so many."""
    format, lead, rows, columns, how = CASES[name]
    generator = torch.Generator().manual_seed(rows * columns)

    def every_byte(*shape: int) -> Tensor:
        count = math.prod((*lead, *shape))
        return (torch.arange(count) * 37 % 256).to(torch.uint8).view(*lead, *shape)

    def random(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator)

    extra = None
    if format == "fp8":
        codes = every_byte(rows, columns).view(torch.float8_e4m3fn)
        blocks = (-(-rows // 128), -(-columns // 128))
        scales = random(*(blocks if how == "blocks" else (rows, 1))).exp()
        scales = scales.bfloat16() if how.endswith("bf16") else scales
    else:
        codes = every_byte(rows, columns // 2)
        group = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}[format]
        if format == "nf4":
            scales = every_byte(rows * columns // group)
            blocks = -(-scales.shape[-1] // 256)
            table = torch.linspace(-1, 1, 256).pow(3).expand(*lead, -1)
            extra = torch.cat([random(blocks).exp(), table, random(1)], -1)
        else:
            scales = every_byte(rows, columns // group)
        if format == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn)
            extra = 3e-3 * random(int(how[0])).exp()
    tensors = [x if x is None else x.to(device) for x in (codes, scales, extra)]
    return QuantizedWeight(format, *tensors, divides=how.endswith("/"))


def finite(weight: QuantizedWeight) -> QuantizedWeight:
    """The same without what is not a number, and of a size that no product overflows."""

    def numbers(x: Tensor) -> Tensor:
        bits = x.view(torch.uint8)
        return torch.where(bits & 127 == 127, 0, bits).view(x.dtype) if x.dtype == torch.float8_e4m3fn else x

    scales = weight.scales.clamp(100, 140) if weight.format == "mxfp4" else numbers(weight.scales)
    return weight._replace(codes=numbers(weight.codes), scales=scales)


def value_by_value(weight: QuantizedWeight) -> Tensor:
    """fp32 ``[..., N, K]`` by a loop."""
    if weight.codes.ndim == 3:
        parts = zip(*(x.unbind() for x in weight[1:4] if x is not None), strict=True)
        return torch.stack([value_by_value(QuantizedWeight(weight.format, *p, divides=weight.divides)) for p in parts])
    rows, columns = weight.shape
    codes = weight.codes.contiguous().view(torch.uint8).flatten().tolist()
    scales = weight.scales.flatten().view(torch.uint8) if weight.format == "nvfp4" else weight.scales.flatten()
    scale = scales.tolist()
    extra = [] if weight.extra is None else weight.extra.tolist()
    found = []
    for i in range(rows * columns):
        n, k = divmod(i, columns)
        high_first = weight.format == "nf4"
        nibble = codes[i // 2] >> 4 if (i % 2 == 0) == high_first else codes[i // 2] & 15 if i // 2 < len(codes) else 0
        if weight.format == "fp8":
            per_row = weight.scales.shape == (rows, 1)
            value = e4m3(codes[i]) * scale[n if per_row else (n // 128) * -(-columns // 128) + k // 128]
        elif weight.format == "nf4":
            b, table = i // 64, extra[-257:-1]
            value = NF4[nibble] * fp32(fp32(table[scale[b]] * extra[b // 256]) + extra[-1])
        elif weight.format == "mxfp4":
            power = scale[i // 32]
            value = e2m1(nibble) * (math.nan if power == 255 else 2.0 ** (power - 127))
        else:
            value, factor = e2m1(nibble) * e4m3(scale[i // 16]), extra[n * len(extra) // rows]
            value = value / factor if weight.divides else value * factor
        found.append(value)
    return torch.tensor(found, dtype=torch.float64).float().view(rows, columns)


NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
NF4 = torch.tensor(NF4).tolist()  # the nearest in fp32


def fp32(value: float) -> float:
    """Twice the digits and two more hold a product, a quotient or a sum of fp32 well enough to round it once more."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def e2m1(nibble: int) -> float:
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -value if nibble & 8 else value


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
    return -value if byte & 128 else value


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    if (
        found.dtype != expected.dtype
        or found.shape != expected.shape
        or not torch.equal(found.isnan(), expected.isnan())
    ):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    return torch.equal(*(x.nan_to_num(nan=0.0, posinf=None, neginf=None).view(bits) for x in (found, expected)))
