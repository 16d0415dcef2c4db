"""The products of ``linear_with_lora`` that are opaque to the compiler: narrow, accumulated, summed in fp32.

They are opaque where a compiler would choose another layout or pass over the output again: a narrow product, one that
adds to what is there, and one that keeps its fp32 sums. They run on the device's own matrix library, but for both
products of a gradient where a kernel of ours that reads it once is faster.
"""

# M tokens, K input width, N output width, W columns of all adapters

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from deltatune.ops._numerics import accumulation_dtype
from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._opaque import opaque

__all__ = ["lora_accumulate", "lora_sum_products", "lora_up_backward"]


def _accumulate_fake(narrow: Tensor, up: Tensor, *_: object) -> Tensor:
    return narrow.new_empty(narrow.shape[0], up.shape[1])


def _accumulate_flops(
    narrow_shape: Sequence[int], up_shape: Sequence[int], _: object, weights: Sequence[Sequence[int]], **__: object
) -> int:
    return 2 * narrow_shape[0] * sum(inner * outer for inner, outer in (up_shape, *weights))


@opaque(fake=_accumulate_fake, flops=_accumulate_flops)
def lora_accumulate(narrow: Tensor, up: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``narrow @ up + sum_i inputs_i @ weights_i``, each product added in the epilogue of its own matrix product.

    The first one is rounded to the output's dtype before the others are added to it. Its size is that of the output
    whatever the inner width, so the narrow one comes first: the wide ones then read what it wrote, in their epilogue.
    """
    summed = torch.mm(narrow, up)
    for x, weight in zip(inputs, weights, strict=True):
        summed.addmm_(x, weight)
    return summed


def _sum_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=accumulation_dtype(left))


def _sum_flops(left_shape: Sequence[int], right_shape: Sequence[int], **_: object) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


@opaque(fake=_sum_fake, flops=_sum_flops)
def lora_sum_products(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` over all tokens, ``[M, P], [M, Q] -> [P, Q]``: fp32 sums kept in fp32, fp64 for fp64."""
    return _sum_products(left, right)


def _sum_products(left: Tensor, right: Tensor) -> Tensor:
    wide = accumulation_dtype(left)
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.mT, right, out_dtype=wide)
    return torch.mm(left.mT.to(wide), right.to(wide))


# Both products of the library over one read, us (H200, bf16, M = 16384, operands of more than L2 by turns), N = 2048
# and 12288: W = 16 42.8 / 28.7, 195.1 / 132.1; W = 32 39.7 / 33.3, 193.3 / 172.7. Not at N = 512: 16.6 / 18.0; nor for
# W = 64, where the parts that programs leave behind weigh as much as the read saved: 40.9 / 42.6, 196.3 / 225.9.
_WIDTHS: Final = (16, 32)
_FEWEST: Final = 16384 * 2048


def _into(t: Tensor, dy: Tensor, up: Tensor, narrow: Tensor) -> Tensor:
    """Writes ``t``, returns the sums."""
    if _reads_once(dy, up, narrow):
        from deltatune.ops._lora_linear.one_read import both_products

        with torch.cuda.device(dy.device):
            return both_products(dy, up, narrow, t)
    torch.mm(dy, up, out=t)
    return _sum_products(dy, narrow)


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
