"""Cross-entropy of ``hidden @ weight.T``, a chunk of tokens at a time, gradients in the same pass.

``p = softmax(hidden weight^T)``, ``loss = -sum log p[label]``, ``dhidden = (p - onehot) weight``,
``dweight = (p - onehot)^T hidden``: three matrix products, where computing the logits again in backward takes four.
"""

# S tokens, E width of hidden, V vocabulary, C tokens of a chunk

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chunk_tokens", "loss_and_gradients"]

_CHUNK_ELEMENTS = 2**28  # 1 GiB of fp32 logits
_ROW_TILE = 128


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits are held at once: 1 GiB of logits, but at most a quarter of all.

    Every chunk reads the whole weight, and the product for ``dhidden`` has only chunk times width results to spread
    over a GPU: small chunks are slow. Whole tiles of rows where there is room for them.
    """
    affordable = max(_CHUNK_ELEMENTS // vocabulary, 1)
    if affordable > _ROW_TILE:
        affordable -= affordable % _ROW_TILE
    return max(min(affordable, -(-tokens // 4)), 1)


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients to ``hidden`` and ``weight``; a gradient not asked for is an empty tensor.

    ``hidden`` ``[S, E]``, ``weight`` ``[V, E]``, ``labels`` ``[S]``. Logits, probabilities, loss and the sum over
    chunks of the weight's gradient are fp32 (fp64 for fp64).
    """
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    accumulation = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    valid = labels != ignore_index
    targets = labels.where(valid, 0).unsqueeze(1)
    _check_targets(targets, vocabulary)
    losses = hidden.new_zeros(tokens, dtype=accumulation)
    dhidden = hidden.new_empty(tokens if hidden_grad else 0, width)
    dweight = weight.new_zeros(vocabulary if weight_grad else 0, width, dtype=accumulation)
    factor = _factor(weight, accumulation)
    step = chunk_tokens(tokens, vocabulary)
    for start in range(0, tokens, step):
        chunk = slice(start, min(start + step, tokens))
        # what an ignored token holds must not reach the others through the products, not even as 0 * NaN
        rows = hidden[chunk].masked_fill(~valid[chunk].unsqueeze(1), 0).to(factor.dtype)
        logits = _product(rows, factor.mT, accumulation)
        losses[chunk], dlogits = _softmax_loss(logits, targets[chunk], valid[chunk], factor.dtype)
        if hidden_grad:
            dhidden[chunk] = dlogits @ factor
        if weight_grad:
            _add_product(dweight, dlogits.mT, rows)
    return losses.sum(), dhidden, dweight.to(weight.dtype)


def _softmax_loss(logits: Tensor, target: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``-log p[target]`` and ``p - onehot`` in ``dtype``, both zero for a token that is not valid; eats the logits.

    The target's entry is computed apart: rounded to 16 bits first, ``p - 1`` would have no correct digit near p = 1.
    """
    logits -= logits.amax(1, keepdim=True)
    picked = logits.gather(1, target)
    total = logits.exp_().sum(1, keepdim=True)
    kept = valid.unsqueeze(1)
    dlogits = torch.empty_like(logits, dtype=dtype) if dtype != logits.dtype else logits
    torch.mul(logits, kept / total, out=dlogits)
    loss = total.log() - picked
    dlogits.scatter_(1, target, (torch.expm1(-loss) * kept).to(dtype))
    return (loss * kept).squeeze(1), dlogits


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    """On a GPU reading the labels would wait for it, and the gather below checks them there."""
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: labels must be ignore_index or in [0, {vocabulary}), got some in [{low}, {high}]; "
            "check that the tokenizer and the head have the same vocabulary"
        )


def _factor(weight: Tensor, accumulation: torch.dtype) -> Tensor:
    """GPUs multiply 16-bit numbers into fp32 results; the CPU does not, so there the weight is widened once."""
    return weight if weight.device.type == "cuda" else weight.to(accumulation)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
