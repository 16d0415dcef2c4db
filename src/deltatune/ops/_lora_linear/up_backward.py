"""``t = dy (s B)`` and ``dB = dy^T u``: an op that reads a gradient once for both where a kernel of ours is faster.

Elsewhere it is the two products of the device's matrix library.
"""

# M tokens, N output width, W columns of all adapters

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from deltatune.ops._lora_linear.op import lora_sum_products
from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._opaque import opaque
from deltatune.ops._triton import triton_refusal

__all__ = ["lora_up_backward"]

# Both products of the library over one read, us on one H200 (torch 2.11, Triton 3.6, bf16, M = 16384, operands of
# more than L2 by turns), N = 2048, 6144, 12288: W = 16 42.8 / 28.7, 104.7 / 70.8, 195.1 / 132.1; W = 32 39.7 / 33.3,
# 103.8 / 85.9, 193.3 / 172.7. Not at N = 512: 16.6 / 18.0 and 15.6 / 19.1; nor for W = 64, where the parts that
# programs leave behind weigh as much as the read that is saved: 40.9 / 42.6, 106.3 / 113.3, 196.3 / 225.9.
_WIDTHS: Final = (16, 32)
_FEWEST: Final = 16384 * 2048


def _into(t: Tensor, dy: Tensor, up: Tensor, narrow: Tensor) -> Tensor:
    """Writes ``t``, returns the sums."""
    if _reads_once(dy, up, narrow):
        from deltatune.ops._lora_linear.one_read import both_products

        with torch.cuda.device(dy.device):
            return both_products(dy, up, narrow, t)
    torch.mm(dy, up, out=t)
    return lora_sum_products(dy, narrow)


def _reads_once(dy: Tensor, up: Tensor, narrow: Tensor) -> bool:
    """Whether the kernel can run, and pays."""
    (tokens, outer), width = dy.shape, up.shape[1]
    return (
        width in _WIDTHS
        and tokens * outer >= _FEWEST
        and dy.dtype in (torch.bfloat16, torch.float16)
        and triton_refusal(dy.device, dy.dtype) is None
        and torch.cuda.get_device_capability(dy.device)[0] == 9  # its tiles fill Hopper's shared memory
        and all(matrix.stride(1) == 1 for matrix in (dy, up, narrow))
        # as the tensor memory accelerator reads it
        and dy.stride(0) >= outer
        and dy.stride(0) % 8 == 0
        and dy.data_ptr() % 16 == 0
    )


def _fake(_grads: object, up: Sequence[Tensor], narrow: Tensor, _offsets: object, width: int) -> list[Tensor]:
    t = narrow.new_empty(narrow.shape[0], width)
    return [t, *(narrow.new_empty(b.shape, dtype=accumulation_dtype(narrow)) for b in up)]


def _flops(_: object, up: Sequence[Sequence[int]], narrow_shape: Sequence[int], *__: object, **___: object) -> int:
    return 4 * narrow_shape[0] * sum(outer * width for outer, width in up)


@opaque(fake=_fake, flops=_flops)
def lora_up_backward(
    grads: Sequence[Tensor], up: Sequence[Tensor], narrow: Tensor, offsets: Sequence[int], width: int
) -> list[Tensor]:
    """``t`` ``[M, width]``, and ``dy_i^T u_i`` ``[N_i, W_i]`` as ``lora_sum_products`` of every i.

    ``t_i = dy_i up_i`` and ``u_i`` are the columns from ``offsets[i]`` on of t and of narrow, as many as ``up_i``
    ``[N_i, W_i]`` has; other columns of t are zero.
    """
    used = sum(b.shape[1] for b in up)
    new = narrow.new_empty if used == width else narrow.new_zeros
    t = new(narrow.shape[0], width)
    found = [t]
    for dy, b, offset in zip(grads, up, offsets, strict=True):
        columns = slice(offset, offset + b.shape[1])
        found.append(_into(t[:, columns], dy, b, narrow[:, columns]))
    return found
