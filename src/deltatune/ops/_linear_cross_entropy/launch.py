"""Launches of the kernels on the tensors of a chunk. Imported only where they run."""

# C tokens of a chunk, E width of hidden, V vocabulary, N entries of a vocabulary block

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deltatune.ops._linear_cross_entropy import kernel

__all__ = [
    "Descriptors",
    "Rows",
    "Tile",
    "descriptors_of",
    "gradients",
    "hidden_gradient",
    "label_logits",
    "powers",
    "settle",
    "tile_for",
]


class Tile(NamedTuple):
    """What a program computes, and with what.

    Attributes:
        rows: tokens.
        entries: of the vocabulary.
        depth: of the product, a step.
        warps: of a program.
        stages: steps whose loads are in flight.
    """

    rows: int
    entries: int
    depth: int
    warps: int
    stages: int


# 2048 x 8192 logits of width 2048 with their exponentials on one H200, Triton 3.6, bf16: 637 TFLOP/s with the first and
# with 128 x 128 and 4 warps; 8 warps there 616, 256 x 128 621, a persistent grid 549, two steps of depth 128 472. The
# plain product on cuBLAS: 726, 654 with fp32 results. Shared memory: 147 KB for the first, 98 KB for the second.
_LARGE: Final = Tile(128, 256, 64, 8, 3)
_SMALL: Final = Tile(128, 128, 64, 4, 3)
_INTERPRETED: Final = Tile(16, 32, 16, 1, 1)

_SPLITS: Final = 8
_TILES_AT_ONCE: Final = 32
_WIDTH_BLOCK: Final = 2048


class Rows(NamedTuple):
    """A chunk of tokens before the head, the head, and what is looked for.

    Attributes:
        hidden: ``[C, E]``, contiguous.
        weight: ``[V, E]``, rows apart by a multiple of 16 bytes.
        labels: int64 ``[C]``.
        ignore_index: the label of a token that counts for nothing.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int


class Descriptors(NamedTuple):
    """A chunk, the head and a place for a block, as the tensor memory accelerator takes them: made once for all blocks.

    Attributes:
        hidden: of ``Rows``.
        weight: likewise.
        stored: ``[C, N or more]`` in 16 bits, or None.
        tile: what programs read and write of them at a time.
    """

    hidden: TensorDescriptor
    weight: TensorDescriptor
    stored: TensorDescriptor | None
    tile: Tile


def descriptors_of(rows: Rows, stored: Tensor | None) -> Descriptors:
    """The tensors of a chunk in tiles of the device's size."""
    tile = tile_for(rows.weight.device)
    return Descriptors(
        _by_tile(rows.hidden, tile.rows, tile.depth),
        _by_tile(rows.weight, tile.entries, tile.depth),
        None if stored is None else _by_tile(stored, tile.rows, tile.entries),
        tile,
    )


def tile_for(device: torch.device) -> Tile:
    """The large tile where shared memory holds it: Hopper and datacenter Blackwell."""
    if device.type != "cuda":
        return _INTERPRETED
    return _LARGE if torch.cuda.get_device_capability(device)[0] in (9, 10) else _SMALL


def label_logits(rows: Rows, reference: Tensor) -> None:
    """``reference_i = weight[label_i] . hidden_i`` in fp32; infinity for ignored tokens, NaN for unknown labels."""
    tokens, width = rows.hidden.shape
    kernel.label_logits_kernel[(tokens,)](
        rows.hidden,
        rows.weight,
        rows.labels,
        reference,
        rows.weight.stride(0),
        rows.weight.shape[0],
        rows.ignore_index,
        width,
        _WIDTH_BLOCK,
        num_warps=4,
    )


def powers(rows: Rows, inputs: Descriptors, reference: Tensor, maxima: Tensor, sums: Tensor, block: slice) -> None:
    """``exp(logit - reference)`` over the entries of ``block``, 0 at the label, into ``inputs.stored`` if there is one.

    Args:
        rows: tokens and head.
        inputs: the same, as descriptors.
        reference: fp32 ``[C]``.
        maxima: fp32 ``[C]``, raised to the highest logits of the block.
        sums: fp32 ``[ceil(N / tile.entries) or more, C]``: of the exponentials, a row for each tile.
        block: N entries of the vocabulary.
    """
    (tokens, width), tile = rows.hidden.shape, inputs.tile
    kernel.powers_kernel[_grid(tokens, block, tile)](
        inputs.hidden,
        inputs.weight,
        inputs.stored,
        rows.labels,
        reference,
        maxima,
        sums,
        tokens,
        block.start,
        block.stop,
        width,
        inputs.stored is not None,
        tile.rows,
        tile.entries,
        tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def settle(
    rows: Rows,
    inputs: Descriptors,
    references: tuple[Tensor, Tensor],
    maxima: Tensor,
    sums: tuple[Tensor, Tensor],
    totals: Tensor,
    products: Tensor | None,
    block: slice,
) -> None:
    """After ``powers``: raises the references that logits have outgrown, and computes those rows of the block again.

    Args:
        rows: tokens and head.
        inputs: as for ``powers``.
        references: as ``powers`` had them, and a place for the new ones.
        maxima: as ``powers`` left them.
        sums: those of this block, and of the one before, which are added to ``totals``.
        totals: fp32 ``[C]``, scaled to the new references.
        products: fp32 ``[C, E]``: exponentials times weight over earlier blocks, scaled to the new references.
        block: as for ``powers``.
    """
    (tokens, width), tile = rows.hidden.shape, inputs.tile
    tiles = sums[0].shape[0]
    splits = min(_SPLITS, tiles)
    kernel.settle_kernel[(triton.cdiv(tokens, tile.rows), splits)](
        inputs.hidden,
        inputs.weight,
        inputs.stored,
        rows.labels,
        *references,
        maxima,
        *sums,
        totals,
        products,
        tokens,
        block.start,
        block.stop,
        tiles,
        splits,
        width,
        inputs.stored is not None,
        _headroom(rows.hidden.dtype),
        _TILES_AT_ONCE,
        tile.rows,
        tile.entries,
        tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def hidden_gradient(rows: Rows, products: Tensor, others: Tensor, inverse: Tensor, dhidden: Tensor) -> None:
    """``dhidden_i = products_i / z_i + (p_i - 1) weight[label_i]``, 0 for ignored tokens.

    ``others`` ``[C]`` is the sum of all exponentials but the label's, ``inverse`` ``[C]`` one over the sum ``z`` of
    all. ``p_i - 1 = -others_i / z_i``: from a ``p`` rounded to 16 bits it would have no correct digit near p = 1.
    """
    tokens, width = rows.hidden.shape
    kernel.hidden_gradient_kernel[(tokens,)](
        products,
        rows.weight,
        rows.labels,
        others,
        inverse,
        dhidden,
        rows.weight.stride(0),
        rows.weight.shape[0],
        rows.ignore_index,
        width,
        _WIDTH_BLOCK,
        num_warps=4,
    )


def gradients(
    rows: Rows, inputs: Descriptors, reference: Tensor, others: Tensor, inverse: Tensor, block: slice
) -> None:
    """``inputs.stored = p - onehot`` over the entries of ``block``, 0 for ignored tokens; arguments as above."""
    (tokens, width), tile = rows.hidden.shape, inputs.tile
    kernel.gradients_kernel[_grid(tokens, block, tile)](
        inputs.hidden,
        inputs.weight,
        inputs.stored,
        rows.labels,
        reference,
        others,
        inverse,
        tokens,
        block.start,
        rows.ignore_index,
        width,
        tile.rows,
        tile.entries,
        tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _headroom(dtype: torch.dtype) -> float:
    """How far a logit may exceed its reference while its exponential, and sums of such, stay finite.

    fp16 ends at exp(11.09); with bf16, exp(60) times any vocabulary and weight stays below fp32's exp(88.7).
    """
    return 10.0 if dtype == torch.float16 else 60.0


def _grid(tokens: int, block: slice, tile: Tile) -> tuple[int]:
    return (triton.cdiv(tokens, tile.rows) * triton.cdiv(block.stop - block.start, tile.entries),)


def _by_tile(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
