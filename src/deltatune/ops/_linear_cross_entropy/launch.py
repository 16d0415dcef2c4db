"""Launches of the kernels on the tensors of a chunk. Imported only where they run."""

# C tokens of a chunk, E width of hidden, V vocabulary, N entries of a vocabulary block

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deltatune.ops._linear_cross_entropy import kernel

__all__ = ["Chunk", "Rows", "Running", "add_block", "chunk_of", "gradients", "hidden_gradient", "label_logits"]


class Tile(NamedTuple):
    """What a program computes, and with what, by the names that the kernels give it.

    Attributes:
        ROWS: tokens.
        ENTRIES: of the vocabulary.
        DEPTH: of the product, a step.
        num_warps: of a program.
        num_stages: steps whose loads are in flight.
    """

    ROWS: int
    ENTRIES: int
    DEPTH: int
    num_warps: int
    num_stages: int


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
    """Tokens before the head, the head, and what is looked for.

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

    def part(self, chunk: slice) -> Rows:
        """These tokens before the same head."""
        return self._replace(hidden=self.hidden[chunk], labels=self.labels[chunk])


class Chunk(NamedTuple):
    """A chunk of tokens, the head and a place for a block, also as the tensor memory accelerator takes them.

    Made once for all blocks.

    Attributes:
        rows: the tokens and the head.
        stored: ``[C, N or more]`` in 16 bits, or None.
        tile: what programs read and write of them at a time.
        tiled: descriptors of hidden, weight and stored.
    """

    rows: Rows
    stored: Tensor | None
    tile: Tile
    tiled: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]


def chunk_of(rows: Rows, stored: Tensor | None) -> Chunk:
    """The tensors of a chunk in tiles of the device's size: large where shared memory holds them."""
    device = rows.weight.device
    if device.type != "cuda":
        tile = _INTERPRETED
    else:  # Hopper and datacenter Blackwell, or others
        tile = _LARGE if torch.cuda.get_device_capability(device)[0] in (9, 10) else _SMALL
    tiled = (
        _by_tile(rows.hidden, tile.ROWS, tile.DEPTH),
        _by_tile(rows.weight, tile.ENTRIES, tile.DEPTH),
        None if stored is None else _by_tile(stored, tile.ROWS, tile.ENTRIES),
    )
    return Chunk(rows, stored, tile, tiled)


class Running(NamedTuple):
    """What is known of the tokens of a chunk after some blocks.

    What one block's kernels read and the next one's write lies in two places, used in turn.

    Attributes:
        references: fp32 ``[2, C]``, ``r`` before a block and after it.
        maxima: fp32 ``[C]``, the highest logits so far.
        sums: fp32 ``[2, ceil(N / tile.ENTRIES) or more, C]``: of a block's exponentials, a row for each tile.
        totals: fp32 ``[C]``: sums over the blocks before, scaled to the new references.
        products: fp32 ``[C, E]``: exponentials times weight over the blocks before, likewise; or None.
    """

    references: Tensor
    maxima: Tensor
    sums: Tensor
    totals: Tensor
    products: Tensor | None


def label_logits(rows: Rows, reference: Tensor) -> None:
    """``reference_i = weight[label_i] . hidden_i`` in fp32; infinity for ignored tokens, NaN for unknown labels."""
    tokens, width = rows.hidden.shape
    kernel.label_logits_kernel[(tokens,)](
        rows.hidden, rows.weight, rows.labels, reference, *_head(rows), width, _WIDTH_BLOCK, num_warps=4
    )


def add_block(chunk: Chunk, running: Running, turn: int, block: slice) -> None:
    """``exp(logit - reference)`` over the entries of ``block``, 0 at the label, into ``chunk.stored`` if there is one.

    A second launch raises the references that logits have outgrown, and computes those rows of the block again.

    Args:
        chunk: tokens and head.
        running: as the blocks before left it; ``references[turn]`` is raised into the other, ``sums[turn]`` written.
        turn: 0, 1, 0, ..., block by block.
        block: N entries of the vocabulary.
    """
    (tokens, width), tile = chunk.rows.hidden.shape, chunk.tile
    inputs, stores = (*chunk.tiled, chunk.rows.labels), chunk.stored is not None
    reference, sums = running.references[turn], running.sums[turn]
    within = (tokens, block.start, block.stop)
    kernel.powers_kernel[_grid(tokens, block, tile)](
        *inputs, reference, running.maxima, sums, *within, width, stores, **tile._asdict()
    )
    tiles = sums.shape[0]
    splits = min(_SPLITS, tiles)
    kernel.settle_kernel[(triton.cdiv(tokens, tile.ROWS), splits)](
        *inputs,
        reference,
        running.references[1 - turn],
        running.maxima,
        sums,
        running.sums[1 - turn],
        running.totals,
        running.products,
        *within,
        tiles,
        splits,
        width,
        stores,
        _headroom(chunk.rows.hidden.dtype),
        _TILES_AT_ONCE,
        **tile._asdict(),
    )


def hidden_gradient(rows: Rows, products: Tensor, others: Tensor, inverse: Tensor, dhidden: Tensor) -> None:
    """``dhidden_i = products_i / z_i + (p_i - 1) weight[label_i]``, 0 for ignored tokens.

    ``others`` ``[C]`` is the sum of all exponentials but the label's, ``inverse`` ``[C]`` one over the sum ``z`` of
    all. ``p_i - 1 = -others_i / z_i``: from a ``p`` rounded to 16 bits it would have no correct digit near p = 1.
    """
    tokens, width = rows.hidden.shape
    tensors = (products, rows.weight, rows.labels, others, inverse, dhidden)
    kernel.hidden_gradient_kernel[(tokens,)](*tensors, *_head(rows), width, _WIDTH_BLOCK, num_warps=4)


def gradients(chunk: Chunk, reference: Tensor, others: Tensor, inverse: Tensor, block: slice) -> None:
    """``chunk.stored = p - onehot`` over the entries of ``block``, 0 for ignored tokens; arguments as above."""
    (tokens, width), tile = chunk.rows.hidden.shape, chunk.tile
    tensors = (*chunk.tiled, chunk.rows.labels, reference, others, inverse)
    kernel.gradients_kernel[_grid(tokens, block, tile)](
        *tensors, tokens, block.start, chunk.rows.ignore_index, width, **tile._asdict()
    )


def _head(rows: Rows) -> tuple[int, int, int]:
    """What kernels that gather the label's entry go by."""
    return rows.weight.stride(0), rows.weight.shape[0], rows.ignore_index


def _headroom(dtype: torch.dtype) -> float:
    """How far a logit may exceed its reference while its exponential, and sums of such, stay finite.

    fp16 ends at exp(11.09); with bf16, exp(60) times any vocabulary and weight stays below fp32's exp(88.7).
    """
    return 10.0 if dtype == torch.float16 else 60.0


def _grid(tokens: int, block: slice, tile: Tile) -> tuple[int]:
    return (triton.cdiv(tokens, tile.ROWS) * triton.cdiv(block.stop - block.start, tile.ENTRIES),)


def _by_tile(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
