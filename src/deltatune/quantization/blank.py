"""Frozen weights in few bits of a given shape, with nothing but zeros in them: what a model is planned with."""

# N rows, K columns

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops import QuantizedWeight
from deltatune.ops._dequantize.weight import BLOCK, GROUP, NESTED, check_groups, nested_blocks

__all__ = ["Encoding", "blank_weight"]


class Encoding(NamedTuple):
    """How matrices are held, beside their shape.

    Attributes:
        format: as in ``QuantizedWeight``.
        blocks: of fp8, whether 128x128 values share a scale, in place of a row.
        scales: of fp8, the dtype of the scales.
        divides: of nvfp4, whether global scales divide.
    """

    format: str
    blocks: bool = False
    scales: torch.dtype = torch.float32
    divides: bool = False

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError where a matrix ``[..., N, K]`` of this shape cannot be held."""
        if self.format != "fp8":
            check_groups("quantize", self.format, *shape[-2:])

    def parts(self, shape: Sequence[int], global_scales: int = 1) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of ``codes``, ``scales`` and, where the format has it, ``extra``."""
        *lead, rows, columns = shape
        byte, floats = torch.uint8, torch.float8_e4m3fn
        if self.format == "fp8":
            grid = [-(-rows // BLOCK), -(-columns // BLOCK)] if self.blocks else [rows, 1]
            return {"codes": ([*lead, rows, columns], floats), "scales": ([*lead, *grid], self.scales)}
        codes = ([*lead, rows, columns // 2], byte)
        if self.format == "nf4":
            extra = nested_blocks(rows * columns) + NESTED + 1
            scales = ([*lead, rows * columns // GROUP["nf4"]], byte)
            return {"codes": codes, "scales": scales, "extra": ([*lead, extra], torch.float32)}
        scales = ([*lead, rows, columns // GROUP[self.format]], byte if self.format == "mxfp4" else floats)
        if self.format == "mxfp4":
            return {"codes": codes, "scales": scales}
        return {"codes": codes, "scales": scales, "extra": ([*lead, global_scales], torch.float32)}


def blank_weight(
    encoding: Encoding, shape: Sequence[int], device: torch.device | str, *, global_scales: int = 1
) -> QuantizedWeight:
    """A weight ``[..., N, K]`` on a device, the meta device too, all of whose bytes are 0."""
    found: dict[str, Tensor] = {
        name: torch.zeros(size, dtype=dtype, device=device)
        for name, (size, dtype) in encoding.parts(shape, global_scales).items()
    }
    weight = QuantizedWeight(encoding.format, **found, divides=encoding.divides)
    weight.check()
    return weight
