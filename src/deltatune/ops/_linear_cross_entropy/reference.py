"""Cross-entropy of ``hidden @ weight.T``, a chunk of tokens at a time, gradients in the same pass.

``p = softmax(hidden weight^T)``, ``loss = -sum log p[label]``, ``dhidden = (p - onehot) weight``,
``dweight = (p - onehot)^T hidden``: three matrix products, where computing the logits again in backward takes four.
"""

# S tokens, E width of hidden, V vocabulary, C tokens of a chunk

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.ops._linear_cross_entropy.blocks import slices
from deltatune.ops._numerics import accumulation_dtype

__all__ = ["check_targets", "chunk_tokens", "losses_and_gradients", "multiply"]

# Elements of the fp32 logits of a chunk, 256 MiB or 1 GiB. Forward and backward in ms for 256 / 512 / 1024 tokens on
# one H200 with torch 2.11 (16384 tokens, vocabulary 248320, width 2048, bf16): 82 / 85 / 76 under a frozen weight,
# where the peak grows from 0.8 to 2.9 GiB; 181 / 133 / 114 where every chunk reads and writes the weight's gradient.
_CHUNK_ELEMENTS = {False: 2**26, True: 2**28}
_ROW_TILE = 128


def chunk_tokens(tokens: int, vocabulary: int, weight_grad: bool) -> int:
    """Tokens whose logits are held at once: whole tiles of rows where there is room, and at most a quarter of all."""
    affordable = max(_CHUNK_ELEMENTS[weight_grad] // vocabulary, 1)
    if affordable > _ROW_TILE:
        affordable -= affordable % _ROW_TILE
    return max(min(affordable, -(-tokens // 4)), 1)


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token, and the gradients of their sum to ``hidden`` and ``weight``.

    A gradient not asked for is an empty tensor. ``hidden`` ``[S, E]``, ``weight`` ``[V, E]``, ``labels`` ``[S]``;
    ``scale`` ``[S]`` is what each loss counts in the gradient of ``weight``, 1 by default. Logits, probabilities,
    losses and the sum over chunks of the weight's gradient are fp32 (fp64 for fp64).
    """
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    accumulation = accumulation_dtype(hidden)
    valid = labels != ignore_index
    targets = labels.where(valid, 0).unsqueeze(1)
    check_targets(targets, vocabulary)
    losses = hidden.new_zeros(tokens, dtype=accumulation)
    dhidden = hidden.new_empty(tokens if hidden_grad else 0, width)
    dweight = weight.new_zeros(vocabulary if weight_grad else 0, width, dtype=accumulation)
    # GPUs multiply 16-bit numbers into fp32 results; the CPU does not, so there the weight is widened once
    factor = weight if weight.device.type == "cuda" else weight.to(accumulation)
    for chunk in slices(tokens, chunk_tokens(tokens, vocabulary, weight_grad)):
        ignored = ~valid[chunk].unsqueeze(1)
        # as zeros, ignored tokens add nothing to dweight, not even 0 * NaN
        rows = hidden[chunk].masked_fill(ignored, 0).to(factor.dtype)
        losses[chunk], dlogits = _softmax_loss(
            multiply(rows, factor.mT, losses.new_empty(len(rows), vocabulary)), targets[chunk], factor.dtype
        )
        if hidden_grad:
            dhidden[chunk] = (dlogits @ factor).masked_fill_(ignored, 0)
        if weight_grad:
            if scale is not None:
                dlogits.mul_(scale[chunk].unsqueeze(1))
            multiply(dlogits.mT, rows, dweight, add=True)
    return losses.masked_fill_(~valid, 0), dhidden, dweight.to(weight.dtype)


def _softmax_loss(logits: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``-log p[target]`` and ``p - onehot`` in ``dtype``.

    The target's entry is computed apart: rounded to 16 bits first, ``p - 1`` would have no correct digit near p = 1.
    """
    log_p = logits.log_softmax(1)
    picked = log_p.gather(1, target)
    dlogits = torch.exp(log_p, out=log_p if dtype == log_p.dtype else torch.empty_like(log_p, dtype=dtype))
    dlogits.scatter_(1, target, picked.expm1().to(dtype))
    return -picked.squeeze(1), dlogits


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """On a GPU reading the labels would wait for it, and the gather below checks them there."""
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: labels must be ignore_index or in [0, {vocabulary}), got some in [{low}, {high}]; "
            "check that the tokenizer and the head have the same vocabulary"
        )


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """``out = a b``, or ``out += a b``, multiplied as ``a`` and ``b`` are and summed as ``out`` is."""
    widened: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, out=out, **widened) if add else torch.mm(a, b, out=out, **widened)
