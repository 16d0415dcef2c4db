"""Cross-entropy of ``hidden @ weight.T`` in blocks of tokens and vocabulary, without logits in memory.

Along a row of blocks runs an online softmax: a product leaves the tensor cores as ``e = exp(logit - r_i)``, 0 at the
label, in the dtype of ``weight``, and ``e weight`` and the sums of ``e`` add up in fp32. At the end
``z_i = sum_v e_iv + exp(label's logit - r_i)`` and
``dhidden_i = sum_v e_iv weight_v / z_i + (p_i - 1) weight[label_i]``: two matrix products, and memory for two blocks.

``dweight = (p - onehot)^T hidden`` needs ``z`` first, and so the logits once more: two further products, block by block
of the vocabulary, with each block's sum over all tokens in fp32 before it is rounded.

Online softmax: arXiv 1805.02867.
"""

# S tokens, E width of hidden, V vocabulary, C tokens of a chunk, N entries of a vocabulary block

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._linear_cross_entropy.blocks import Blocks, softmax_blocks, weight_blocks

if TYPE_CHECKING:
    from deltatune.ops._linear_cross_entropy.launch import Rows

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
    from deltatune.ops._linear_cross_entropy.launch import Rows

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
    for chunk in _slices(tokens, sizes.tokens):
        part = rows._replace(hidden=rows.hidden[chunk], labels=rows.labels[chunk])
        found = _Softmax(*(each[chunk] for each in softmax))
        _softmax(part, found, None if dhidden is None else dhidden[chunk], sizes.entries)
    return softmax


def _softmax(rows: Rows, found: _Softmax, dhidden: Tensor | None, size: int) -> None:
    """Fills ``found`` and ``dhidden`` for a chunk of tokens."""
    from deltatune.ops._linear_cross_entropy import launch

    (tokens, width), weight = rows.hidden.shape, rows.weight
    stored = None if dhidden is None else weight.new_empty(tokens, size)
    inputs = launch.descriptors_of(rows, stored)
    # what one block's kernels read and the next one's write lies in two places, used in turn
    references = _empty(weight, 2, tokens)
    sums = _empty(weight, 2, -(-size // inputs.tile.entries), tokens)
    maxima, totals = _empty(weight, tokens).fill_(-torch.inf), _empty(weight, tokens)
    products = None if dhidden is None else _empty(weight, tokens, width)
    launch.label_logits(rows, references[0])
    found.picked.copy_(references[0])
    used = turn = 0
    for index, block in enumerate(_slices(weight.shape[0], size)):
        turn = index % 2
        both, new_sums = (references[turn], references[1 - turn]), (sums[turn], sums[1 - turn])
        launch.powers(rows, inputs, both[0], maxima, sums[turn], block)
        launch.settle(rows, inputs, both, maxima, new_sums, totals, products, block)
        used = -(-(block.stop - block.start) // inputs.tile.entries)
        if stored is not None and products is not None:
            _multiply(stored[:, : block.stop - block.start], weight[block], products, add=index > 0)
    found.reference.copy_(references[1 - turn])
    torch.add(totals, sums[turn, :used].sum(0), out=found.others)
    torch.reciprocal(found.others + torch.exp(found.picked - found.reference), out=found.inverse)
    if dhidden is not None and products is not None:
        launch.hidden_gradient(rows, products, found.others, found.inverse, dhidden)


def _weight_gradient(rows: Rows, softmax: _Softmax, dweight: Tensor, sizes: Blocks) -> None:
    from deltatune.ops._linear_cross_entropy import launch

    (tokens, width), weight = rows.hidden.shape, rows.weight
    stored = weight.new_empty(min(sizes.tokens, tokens), sizes.entries)
    sums = torch.zeros(sizes.entries, width, dtype=torch.float32, device=weight.device)
    chunks = []
    for chunk in _slices(tokens, sizes.tokens):
        part = rows._replace(hidden=rows.hidden[chunk], labels=rows.labels[chunk])
        known = softmax.reference[chunk], softmax.others[chunk], softmax.inverse[chunk]
        found = stored[: chunk.stop - chunk.start]
        chunks.append((part, launch.descriptors_of(part, found), known, found))
    for block in _slices(weight.shape[0], sizes.entries):
        size = block.stop - block.start
        for number, (part, inputs, known, found) in enumerate(chunks):
            launch.gradients(part, inputs, *known, block)
            _multiply(found[:, :size].mT, part.hidden, sums[:size], add=number > 0)
        dweight[block] = sums[:size]


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a b``, or ``out += a b``, multiplied as ``a`` and ``b`` are and summed as ``out`` is."""
    widened: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **widened)
    else:
        torch.mm(a, b, out=out, **widened)


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


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
