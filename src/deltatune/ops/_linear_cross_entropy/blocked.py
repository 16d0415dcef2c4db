"""Cross-entropy of ``hidden @ weight.T`` in blocks of tokens and vocabulary, without logits in memory.

Along a row of blocks runs an online softmax: a product leaves the tensor cores as ``e = exp(logit - r_i)``, 0 at the
label, in the dtype of ``weight``, and ``e weight`` and the sums of ``e`` add up in fp32. At the end
``z_i = sum_v e_iv + exp(label's logit - r_i)`` and
``dhidden_i = sum_v e_iv weight_v / z_i + (p_i - 1) weight[label_i]``: two matrix products, and memory for two blocks.

``dweight = (p - onehot)^T hidden`` needs ``z`` first, and so the logits once more: two further products, block by block
of the vocabulary, with each block's sum over all tokens in fp32 before it is rounded.

Online softmax: arXiv 1805.02867. Imports Triton, so it is imported only where it runs.
"""

# S tokens, E width of hidden, V vocabulary, C tokens of a chunk, N entries of a vocabulary block

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deltatune.ops._linear_cross_entropy import kernel
from deltatune.ops._linear_cross_entropy.blocks import Blocks, slices, softmax_blocks, weight_blocks
from deltatune.ops._linear_cross_entropy.reference import multiply

__all__ = ["Rows", "chunk_of", "gradients", "losses_and_gradients"]


class Tile(NamedTuple):
    """What a program computes, and with what, by the names that the kernels give it."""

    ROWS: int  # tokens
    ENTRIES: int  # of the vocabulary
    DEPTH: int  # of the product, a step
    num_warps: int  # of a program
    num_stages: int  # steps whose loads are in flight


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
    """Tokens before the head, the head, and what is looked for."""

    hidden: Tensor  # [C, E], contiguous
    weight: Tensor  # [V, E], rows apart by a multiple of 16 bytes
    labels: Tensor  # int64 [C]
    ignore_index: int  # the label of a token that counts for nothing

    def part(self, chunk: slice) -> Rows:
        """These tokens before the same head."""
        return self._replace(hidden=self.hidden[chunk], labels=self.labels[chunk])


class Chunk(NamedTuple):
    """A chunk of tokens, the head and a place for a block, also as the tensor memory accelerator takes them.

    Made once for all blocks.
    """

    rows: Rows
    stored: Tensor | None  # [C, N or more] in 16 bits
    tile: Tile  # what programs read and write of them at a time
    tiled: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]  # of hidden, weight and stored


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

    All are fp32. What one block's kernels read and the next one's write lies in two places, used in turn.
    """

    references: Tensor  # [2, C], r before a block and after it
    maxima: Tensor  # [C], the highest logits so far
    sums: Tensor  # [2, ceil(N / tile.ENTRIES) or more, C], of a block's exponentials, a row for each tile
    totals: Tensor  # [C], sums over the blocks before, scaled to the new references
    products: Tensor | None  # [C, E], exponentials times weight over the blocks before, likewise


class _Softmax(NamedTuple):
    """What is known of each token at the end, fp32 ``[S]``."""

    reference: Tensor  # r; infinity for ignored tokens
    others: Tensor  # the sum of exp(logit - r) over all entries but the label's
    picked: Tensor  # the label's logit
    inverse: Tensor  # one over the sum over all entries


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    scale: Tensor | None = None,
    softmax_sizes: Blocks | None = None,
    weight_sizes: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token in fp32, and the gradients of their sum to ``hidden`` and ``weight``.

    A gradient not asked for is an empty tensor. ``hidden`` ``[S, E]``, ``weight`` ``[V, E]``, ``labels`` int64 ``[S]``;
    ``scale`` ``[S]`` is what each loss counts in the gradient of ``weight``, 1 by default. An unknown label fails an
    assertion on the device, as it would in a gather: reading the labels would wait for them.
    """
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight, labels = _addressable(hidden), _addressable(weight), labels.contiguous()
    valid = labels != ignore_index
    _assert_known(labels, valid, vocabulary)
    rows = Rows(hidden, weight, labels, ignore_index)
    dhidden = hidden.new_empty(tokens if hidden_grad else 0, width)
    sizes = softmax_sizes or softmax_blocks(tokens, width, vocabulary)
    softmax = _Softmax(*_empty(weight, 4, tokens))
    for chunk in slices(tokens, sizes.tokens):
        found = _Softmax(*(each[chunk] for each in softmax))
        _softmax(rows.part(chunk), found, dhidden[chunk] if hidden_grad else None, sizes.entries)
    dweight = weight.new_empty(vocabulary if weight_grad else 0, width)
    if weight_grad:
        # as zeros, ignored tokens add nothing, not even 0 * NaN
        rows = rows._replace(hidden=hidden.masked_fill(~valid.unsqueeze(1), 0))
        if scale is not None:
            softmax = softmax._replace(inverse=softmax.inverse * scale)
        _weight_gradient(rows, softmax, dweight, weight_sizes or weight_blocks(tokens, vocabulary))
    return _losses(softmax).masked_fill_(~valid, 0), dhidden, dweight


def _losses(softmax: _Softmax) -> Tensor:
    """``log z + r - picked``; ``log(1 + others / label's)`` where the label has most of ``z``, which does not round."""
    label_power = torch.exp(softmax.picked - softmax.reference)
    above = softmax.reference - softmax.picked
    near_one = torch.log1p(softmax.others / label_power)
    return torch.where(label_power > softmax.others, near_one, torch.log(softmax.others + label_power) + above)


def _softmax(rows: Rows, found: _Softmax, dhidden: Tensor | None, size: int) -> None:
    """Fills ``found`` and ``dhidden`` for a chunk of tokens."""
    (tokens, width), weight = rows.hidden.shape, rows.weight
    head = weight.stride(0), weight.shape[0], rows.ignore_index
    chunk = chunk_of(rows, None if dhidden is None else weight.new_empty(tokens, size))
    running = Running(
        references=_empty(weight, 2, tokens),
        maxima=_empty(weight, tokens).fill_(-torch.inf),
        sums=_empty(weight, 2, -(-size // chunk.tile.ENTRIES), tokens),
        totals=_empty(weight, tokens),
        products=None if dhidden is None else _empty(weight, tokens, width),
    )
    # infinity for ignored tokens, NaN for unknown labels
    kernel.label_logits_kernel[(tokens,)](
        rows.hidden, weight, rows.labels, running.references[0], *head, width, _WIDTH_BLOCK, num_warps=4
    )
    found.picked.copy_(running.references[0])
    used = turn = 0
    for index, block in enumerate(slices(weight.shape[0], size)):
        turn, entries = index % 2, block.stop - block.start
        _add_block(chunk, running, turn, block)
        used = -(-entries // chunk.tile.ENTRIES)
        if chunk.stored is not None and running.products is not None:
            multiply(chunk.stored[:, :entries], weight[block], running.products, add=index > 0)
    found.reference.copy_(running.references[1 - turn])
    torch.add(running.totals, running.sums[turn, :used].sum(0), out=found.others)
    torch.reciprocal(found.others + torch.exp(found.picked - found.reference), out=found.inverse)
    if dhidden is not None and running.products is not None:
        # p - 1 = -others / z at the label: from a p rounded to 16 bits it would have no correct digit near p = 1
        tensors = (running.products, weight, rows.labels, found.others, found.inverse, dhidden)
        kernel.hidden_gradient_kernel[(tokens,)](*tensors, *head, width, _WIDTH_BLOCK, num_warps=4)


def _weight_gradient(rows: Rows, softmax: _Softmax, dweight: Tensor, sizes: Blocks) -> None:
    (tokens, width), weight = rows.hidden.shape, rows.weight
    stored = weight.new_empty(min(sizes.tokens, tokens), sizes.entries)
    sums = torch.zeros(sizes.entries, width, dtype=torch.float32, device=weight.device)
    chunks = []
    for part in slices(tokens, sizes.tokens):
        known = softmax.reference[part], softmax.others[part], softmax.inverse[part]
        found = stored[: part.stop - part.start]
        chunks.append((chunk_of(rows.part(part), found), known, found))
    for block in slices(weight.shape[0], sizes.entries):
        size = block.stop - block.start
        for number, (chunk, known, found) in enumerate(chunks):
            gradients(chunk, *known, block)
            multiply(found[:, :size].mT, chunk.rows.hidden, sums[:size], add=number > 0)
        dweight[block] = sums[:size]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _addressable(matrix: Tensor) -> Tensor:
    """As the tensor memory accelerator reads it: rows dense, each beginning at a multiple of 16 bytes."""
    apart = matrix.stride(0) * matrix.dtype.itemsize
    if matrix.stride(1) == 1 and apart % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _assert_known(labels: Tensor, valid: Tensor, vocabulary: int) -> None:
    known = (labels >= 0) & (labels < vocabulary) | ~valid
    torch._assert_async(known.all(), f"linear_cross_entropy: labels must be ignore_index or in [0, {vocabulary})")


def _add_block(chunk: Chunk, running: Running, turn: int, block: slice) -> None:
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


def gradients(chunk: Chunk, reference: Tensor, others: Tensor, inverse: Tensor, block: slice) -> None:
    """``chunk.stored = p - onehot`` over the entries of ``block``, 0 for ignored tokens."""
    (tokens, width), tile = chunk.rows.hidden.shape, chunk.tile
    tensors = (*chunk.tiled, chunk.rows.labels, reference, others, inverse)
    kernel.gradients_kernel[_grid(tokens, block, tile)](
        *tensors, tokens, block.start, chunk.rows.ignore_index, width, **tile._asdict()
    )


def _headroom(dtype: torch.dtype) -> float:
    """How far a logit may exceed its reference while its exponential, and sums of such, stay finite.

    fp16 ends at exp(11.09); with bf16, exp(60) times any vocabulary and weight stays below fp32's exp(88.7).
    """
    return 10.0 if dtype == torch.float16 else 60.0


def _grid(tokens: int, block: slice, tile: Tile) -> tuple[int]:
    return (triton.cdiv(tokens, tile.ROWS) * triton.cdiv(block.stop - block.start, tile.ENTRIES),)


def _by_tile(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
