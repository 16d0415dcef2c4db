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

from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops._linear_cross_entropy import launch
from deltatune.ops._linear_cross_entropy.blocks import Blocks, slices, softmax_blocks, weight_blocks
from deltatune.ops._linear_cross_entropy.launch import Rows
from deltatune.ops._linear_cross_entropy.reference import multiply

__all__ = ["loss_and_gradients"]


class _Softmax(NamedTuple):
    """What is known of each token at the end, fp32 ``[S]``.

    Attributes:
        reference: ``r``; infinity for ignored tokens.
        others: the sum of ``exp(logit - r)`` over all entries but the label's.
        picked: the label's logit.
        inverse: one over the sum over all entries.
    """

    reference: Tensor
    others: Tensor
    picked: Tensor
    inverse: Tensor


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    softmax_sizes: Blocks | None = None,
    weight_sizes: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss in fp32, and its gradients to ``hidden`` and ``weight``; one not asked for is an empty tensor.

    ``hidden`` ``[S, E]``, ``weight`` ``[V, E]``, ``labels`` int64 ``[S]``. An unknown label fails an assertion on the
    device, as it would in a gather: reading the labels would wait for them.
    """
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight, labels = _addressable(hidden), _addressable(weight), labels.contiguous()
    valid = labels != ignore_index
    _assert_known(labels, valid, vocabulary)
    rows = Rows(hidden, weight, labels, ignore_index)
    dhidden = hidden.new_empty(tokens if hidden_grad else 0, width)
    sizes = softmax_sizes or softmax_blocks(tokens, width, vocabulary)
    softmax = _all_chunks(rows, dhidden if hidden_grad else None, sizes)
    dweight = weight.new_empty(vocabulary if weight_grad else 0, width)
    if weight_grad:
        # as zeros, ignored tokens add nothing, not even 0 * NaN
        rows = rows._replace(hidden=hidden.masked_fill(~valid.unsqueeze(1), 0))
        _weight_gradient(rows, softmax, dweight, weight_sizes or weight_blocks(tokens, vocabulary))
    return _losses(softmax).masked_fill_(~valid, 0).sum(), dhidden, dweight


def _losses(softmax: _Softmax) -> Tensor:
    """``log z + r - picked``; ``log(1 + others / label's)`` where the label has most of ``z``, which does not round."""
    label_power = torch.exp(softmax.picked - softmax.reference)
    above = softmax.reference - softmax.picked
    near_one = torch.log1p(softmax.others / label_power)
    return torch.where(label_power > softmax.others, near_one, torch.log(softmax.others + label_power) + above)


def _all_chunks(rows: Rows, dhidden: Tensor | None, sizes: Blocks) -> _Softmax:
    tokens = rows.hidden.shape[0]
    softmax = _Softmax(*_empty(rows.weight, 4, tokens))
    for chunk in slices(tokens, sizes.tokens):
        found = _Softmax(*(each[chunk] for each in softmax))
        _softmax(rows.part(chunk), found, None if dhidden is None else dhidden[chunk], sizes.entries)
    return softmax


def _softmax(rows: Rows, found: _Softmax, dhidden: Tensor | None, size: int) -> None:
    """Fills ``found`` and ``dhidden`` for a chunk of tokens."""
    (tokens, width), weight = rows.hidden.shape, rows.weight
    chunk = launch.chunk_of(rows, None if dhidden is None else weight.new_empty(tokens, size))
    running = launch.Running(
        references=_empty(weight, 2, tokens),
        maxima=_empty(weight, tokens).fill_(-torch.inf),
        sums=_empty(weight, 2, -(-size // chunk.tile.ENTRIES), tokens),
        totals=_empty(weight, tokens),
        products=None if dhidden is None else _empty(weight, tokens, width),
    )
    launch.label_logits(rows, running.references[0])
    found.picked.copy_(running.references[0])
    used = turn = 0
    for index, block in enumerate(slices(weight.shape[0], size)):
        turn, entries = index % 2, block.stop - block.start
        launch.add_block(chunk, running, turn, block)
        used = -(-entries // chunk.tile.ENTRIES)
        if chunk.stored is not None and running.products is not None:
            multiply(chunk.stored[:, :entries], weight[block], running.products, add=index > 0)
    found.reference.copy_(running.references[1 - turn])
    torch.add(running.totals, running.sums[turn, :used].sum(0), out=found.others)
    torch.reciprocal(found.others + torch.exp(found.picked - found.reference), out=found.inverse)
    if dhidden is not None and running.products is not None:
        launch.hidden_gradient(rows, running.products, found.others, found.inverse, dhidden)


def _weight_gradient(rows: Rows, softmax: _Softmax, dweight: Tensor, sizes: Blocks) -> None:
    (tokens, width), weight = rows.hidden.shape, rows.weight
    stored = weight.new_empty(min(sizes.tokens, tokens), sizes.entries)
    sums = torch.zeros(sizes.entries, width, dtype=torch.float32, device=weight.device)
    chunks = []
    for part in slices(tokens, sizes.tokens):
        known = softmax.reference[part], softmax.others[part], softmax.inverse[part]
        found = stored[: part.stop - part.start]
        chunks.append((launch.chunk_of(rows.part(part), found), known, found))
    for block in slices(weight.shape[0], sizes.entries):
        size = block.stop - block.start
        for number, (chunk, known, found) in enumerate(chunks):
            launch.gradients(chunk, *known, block)
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
