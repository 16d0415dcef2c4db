"""Matrices to nf4 and fp8, one at a time, in plain torch."""

# G experts, N rows, K columns, S groups of values that share a scale, B blocks of 256 such scales

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._dequantize.reference import NF4
from deltatune.ops._dequantize.weight import BLOCK, GROUP, NESTED, QuantizedWeight, check_groups

__all__ = ["quantize"]

_LARGEST: Final = 448.0  # of e4m3
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def quantize(weight: Tensor, format: str, *, blocks: bool = False) -> QuantizedWeight:
    """A matrix, or each of several by itself, in a format of few bits.

    nf4: the bytes of bitsandbytes' ``quantize_4bit(compress_statistics=True, quant_type="nf4", blocksize=64)`` of every
    matrix on the same device. The nearest code for ``w * (1 / absmax)`` of each 64 values, row by row; those absolute
    maxima less their mean in 8 bits, again by the absolute maximum of each 256 of them.

    fp8: ``scale = absmax / 448``, code ``w / scale`` rounded to the nearest e4m3, ties to even.

    Args:
        weight: ``[N, K]`` or ``[G, N, K]`` in bf16, fp16 or fp32, any strides. For nf4 N * K is a multiple of 64 and K
            is even.
        format: ``"nf4"`` or ``"fp8"``.
        blocks: of fp8, one scale for each 128x128 values, fewer at the ends of rows and columns, in place of one for
            each row (an output channel of a linear layer).

    Returns:
        A ``QuantizedWeight``, contiguous, scales of fp8 in fp32. Not finite values make those that share their scale
        not finite, of nf4 the matrix. What is held meanwhile, in fp32, is a few copies of one matrix.

    Raises:
        ValueError: another format, dtype or number of dims, or a size that the format cannot hold.
    """
    name = "quantize"
    if format not in ("nf4", "fp8"):
        raise ValueError(f"{name}: expected format 'nf4' or 'fp8', got {format!r}; other formats are only read")
    if weight.ndim not in (2, 3) or weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: expected a weight [N, K] or [G, N, K] in bf16, fp16 or fp32, "
            f"got {list(weight.shape)} in {weight.dtype}"
        )
    encode: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    if format == "nf4":
        if blocks:
            raise ValueError(f"{name}: blocks=True is for fp8; nf4 has a scale for each {GROUP['nf4']} values")
        check_groups(name, format, *weight.shape[-2:])
        encode = _nf4
    else:
        encode = _fp8_blocks if blocks else _fp8_rows
    if weight.ndim == 2:
        return QuantizedWeight(format, *encode(weight))
    codes, scales, extra = zip(*map(encode, weight.unbind()), strict=True)
    nested = torch.stack(extra) if format == "nf4" else None
    return QuantizedWeight(format, torch.stack(codes), torch.stack(scales), nested)


def _nf4(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what is nested, of ``[N, K]``."""
    codes, absmax = _nearest(matrix.float().reshape(-1), torch.tensor(NF4), GROUP["nf4"])
    packed = (codes[::2] << 4 | codes[1::2]).view(matrix.shape[0], -1)
    offset, table = absmax.mean(), _dynamic_table()
    scales, nested = _nearest(absmax - offset, table, NESTED, stepped=matrix.device.type == "cpu")
    return packed, scales, torch.cat([nested, table.to(matrix.device), offset.view(1)])


def _nearest(values: Tensor, table: Tensor, group: int, *, stepped: bool = False) -> tuple[Tensor, Tensor]:
    """The entries of an ascending table nearest to ``values / absmax``, uint8, and the absmax of each group."""
    padded = F.pad(values, (0, -len(values) % group)).view(-1, group)
    absmax = padded.abs().amax(-1)
    scaled = (padded * (1 / absmax.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1).view(-1)[: len(values)]
    if stepped:
        # bitsandbytes 0.50 rounds to 65536 steps before it looks up 8 bits on a CPU, and nowhere else
        scaled = ((scaled + 1) * 32767.5 + 0.5).floor() * (2 / 65535) - 1
    middles = ((table[:-1] + table[1:]) / 2).to(values.device)
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8), absmax


def _dynamic_table() -> Tensor:
    """256 values from -1 to 1, of which half as many lie in each next power of ten towards 0 (arXiv 1511.04561)."""
    parts = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        steps = 10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        parts += [steps, -steps]
    return torch.cat(parts).sort().values


def _fp8_rows(matrix: Tensor) -> tuple[Tensor, Tensor, None]:
    values = matrix.float()
    scale = _scale(values.abs().amax(-1, keepdim=True))
    return (values / scale).to(torch.float8_e4m3fn), scale, None


def _fp8_blocks(matrix: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, columns = matrix.shape
    padded = F.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = _scale(tiles.abs().amax((1, 3)))
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale, None


def _scale(absmax: Tensor) -> Tensor:
    # of zeros a number that can divide
    return (absmax / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
