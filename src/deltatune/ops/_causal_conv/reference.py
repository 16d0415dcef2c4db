"""The specification: a sum of shifted inputs, each kept only where it comes from the same document."""

# B batch, T tokens, N = B*T, D channels, W width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv"]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, positions: Tensor) -> Tensor:
    """``y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j})`` over the j that stay inside the document.

    Plain torch, which Inductor fuses into one kernel. ``positions`` ``[N]`` are offsets inside the documents.
    """
    stream = x.reshape(-1, x.shape[-1])
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    # a bf16 sum of W terms would round W times: accumulate wide, round once at the end
    taps = weight.to(acc_dtype)
    y = stream.to(acc_dtype) * taps[:, width - 1]
    for shift in range(1, min(width, stream.shape[0])):
        shifted = F.pad(stream[:-shift], (0, 0, shift, 0)).to(acc_dtype)
        # selected, not multiplied by 0: another document's NaN times 0 would be NaN here and in its gradient
        inside = (positions >= shift).unsqueeze(-1)
        y = y + torch.where(inside, shifted, 0.0) * taps[:, width - 1 - shift]
    if bias is not None:
        y = y + bias.to(acc_dtype)
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype).reshape(x.shape)
