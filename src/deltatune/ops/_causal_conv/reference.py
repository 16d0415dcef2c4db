"""The specification: a sum of shifted inputs, each kept only where it comes from the same document."""

# B batch, T tokens, N = B*T, D channels, W width, S sequences

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._numerics import L2_EPS, accumulation_dtype

__all__ = ["causal_conv", "normalise"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    before: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """``y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j})`` over the j that stay inside the document.

    Plain torch, which Inductor fuses into one kernel. ``positions`` ``[N]`` are offsets inside the documents;
    ``before`` is what stands before each sequence ``[S, W-1, D]``, zeros where None, and the sequence of each token.
    In contiguous parts ``[B, T, split[i]]``, heads of ``l2norm[i]`` channels normalised where not 0.
    """
    stream = x.reshape(-1, x.shape[-1])
    acc_dtype = accumulation_dtype(x)
    width = weight.shape[1]
    # a bf16 sum of W terms would round W times: accumulate wide, round once at the end
    taps = weight.to(acc_dtype)
    y = stream.to(acc_dtype) * taps[:, width - 1]
    for shift in range(1, width if before is not None else min(width, stream.shape[0])):
        shifted = F.pad(stream[:-shift], (0, 0, min(shift, stream.shape[0]), 0)).to(acc_dtype)
        # selected, not multiplied by 0: another document's NaN times 0 would be NaN here and in its gradient
        inside = (positions >= shift).unsqueeze(-1)
        outside = 0.0 if before is None else _before(*before, positions - shift).to(acc_dtype)
        y = y + torch.where(inside, shifted, outside) * taps[:, width - 1 - shift]
    if bias is not None:
        y = y + bias.to(acc_dtype)
    if activation is not None:
        y = F.silu(y)
    y = y.reshape(x.shape)
    pieces = torch.split(y, list(split), dim=-1) if len(split) > 1 else (y,)
    return tuple(normalise(part, head).to(x.dtype).contiguous() for part, head in zip(pieces, l2norm, strict=True))


def normalise(x: Tensor, head: int) -> Tensor:
    """``x * rsqrt(sum(x^2) + eps)`` over each run of ``head`` channels; as it is where ``head`` is 0."""
    if head == 0:
        return x
    wide = x.to(accumulation_dtype(x)).reshape(*x.shape[:-1], x.shape[-1] // head, head)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype).reshape(x.shape)


def _before(left: Tensor, sequence: Tensor, offsets: Tensor) -> Tensor:
    """``[N, D]``: what stands ``-offsets`` tokens before each token's sequence; any value where offsets are >= 0."""
    places = left.shape[1]
    return left[sequence, (places + offsets).clamp(0, places - 1).long()]
