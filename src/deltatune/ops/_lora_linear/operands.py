"""What the products of a call read: the factors of all adapters, scaled, cast and laid out for each direction.

``counts`` are the numbers of adapters of every layer; all adapters stand in a row, and so do their ``scales``. Plain
loops: the compiler traces each instruction, for every layer with adapters.
"""

# K input width, N output width, W columns of u, those of a layer in whole 16s

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["copied", "forward_operands", "laid_out", "parts", "scaled"]

#: What tensor cores multiply at once.
_MULTIPLE: Final = 16


def parts(tensors: Sequence[Any], num_adapters: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Weights, A and B."""
    first = len(tensors) - 2 * num_adapters
    return tensors[:first], tensors[first : first + num_adapters], tensors[first + num_adapters :]


def laid_out(
    counts: Sequence[int], down: Sequence[Tensor], up: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[int], list[tuple[int, int]]]:
    """Of each layer ``A [W_i, K]``, ``B [N, W_i]`` and its first column of W; of each adapter its layer and column."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    offsets: list[int] = []
    places: list[tuple[int, int]] = []
    width = 0
    for count in counts:
        first, used = len(places), 0
        for a in down[first : first + count]:
            places.append((len(rows), used))
            used += a.shape[0]
        of_down, of_up = list(down[first : first + count]), list(up[first : first + count])
        a, b = (of_down[0], of_up[0]) if count == 1 else (torch.cat(of_down), torch.cat(of_up, 1))
        if more := -used % _MULTIPLE:
            a, b = torch.constant_pad_nd(a, (0, 0, 0, more)), torch.constant_pad_nd(b, (0, more))
        rows.append(a)
        columns.append(b)
        offsets.append(width)
        width += used + more
    return rows, columns, offsets, places


def scaled(tensors: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """``tensor * scale`` of each, rounded once, to ``dtype``."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return [(x * scale).to(dtype) for x, scale in zip(wide, scales, strict=True)]


def copied(*tensors: Tensor) -> list[Tensor]:
    """All of them in one buffer, which a compiler writes at once."""
    pieces = torch.split(torch.cat([x.reshape(-1) for x in tensors]), [x.numel() for x in tensors])
    return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def forward_operands(
    dtype: torch.dtype, counts: Sequence[int], scales: Sequence[float], down: Sequence[Tensor], up: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[int]]:
    """``cat(s A)^T [K, W]``, of each layer ``B [N, W_i]`` and its first column of W; in one buffer."""
    rows, columns, offsets, _ = laid_out(counts, scaled(down, scales, dtype), [b.to(dtype) for b in up])
    # a product of the library with [K, W] takes 27 us, with [W, K] 53 (H200, bf16, M = 16384, K = 2048, W = 64)
    across, *columns = copied(torch.cat([a.mT for a in rows], 1), *columns)
    return across, columns, offsets
