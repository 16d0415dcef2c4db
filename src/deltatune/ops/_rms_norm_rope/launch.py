"""Launches of the kernels, q and k in one. Imported only where they run."""

# S tokens of all rows, P positions of cos and sin (S, or T where one row serves all), N heads of q, M of k, D head dim,
# R rotary dim

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.ops._rms_norm_rope import kernel
from deltatune.ops._rms_norm_rope.reference import result_dtype, scaled_dtype

__all__ = ["backward", "forward"]

# Numbers a program holds of each tensor, and warps. H200, bf16, 16384 tokens, 40/8 heads of 128 and 16/4 of 256: from
# 1024 to 4096 with 4 warps within 4% of each other both ways, 8192 with 8 warps 11% to 14% slower forward.
_ELEMENTS, _WARPS = 2048, 4
# With a weight's gradient, whose sums take registers too; and the tiles one program sums. There: 1.07x and 1.06x as
# fast as 2048 numbers and 16 tiles, 1.04x and 1.09x as fast as 8 tiles.
_SUMMED_ELEMENTS, _TILES = 1024, 16

_NO_SCALE, _WEIGHT, _ONE_PLUS_WEIGHT = 0, 1, 2
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor | None]:
    """q ``[S, N, D]`` and k ``[S, M, D]`` normalised and rotated, contiguous; cos and sin ``[P, R]``."""
    heads = [(_unit_stride(q), q_weight)]
    if k is not None:
        heads.append((_unit_stride(k), k_weight))
    outs = [x.new_empty(x.shape, dtype=result_dtype(x, w, cos, unit_offset)) for x, w in heads]
    rows = _rows(q.shape[-1])
    programs = [triton.cdiv(x.shape[0] * x.shape[1], rows) for x, _ in heads]
    if sum(programs):
        # alone, q stands in for k too, which then has no programs
        (x, w), (x2, w2) = heads[0], heads[-1]
        cos, sin = _unit_stride(cos), _unit_stride(sin)
        kernel.forward_kernel[(sum(programs),)](
            *(x, outs[0], w, x2, outs[-1], w2, cos, sin),
            *(*x.stride()[:2], *x2.stride()[:2], cos.stride(0), sin.stride(0)),
            *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
            *(_scale(w, unit_offset), _DTYPES[scaled_dtype(x, w, unit_offset)], rows, _pairs(x.shape[2])),
            num_warps=_WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would skip a rounding of the stock modules
        )
    return outs[0], None if k is None else outs[1]


def backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    unit_offset: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q and k, contiguous, and with ``weight_grad`` those of their weights.

    A weight's is summed in fp32 in a fixed order: each program over its rows, then over the programs.
    """
    heads = [(_unit_stride(q_grad), _unit_stride(q), q_weight)]
    if k is not None:
        assert k_grad is not None
        heads.append((_unit_stride(k_grad), _unit_stride(k), k_weight))
    grads = [x.new_empty(x.shape) for _, x, _ in heads]
    rows, tiles = (_rows(q.shape[-1], _SUMMED_ELEMENTS), _TILES) if weight_grad else (_rows(q.shape[-1]), 1)
    programs = [triton.cdiv(x.shape[0] * x.shape[1], rows * tiles) for _, x, _ in heads]
    sums = q.new_empty(sum(programs) if weight_grad else 0, q.shape[-1], dtype=torch.float32)
    if sum(programs):
        (dy, x, w), (dy2, x2, w2) = heads[0], heads[-1]
        cos, sin = _unit_stride(cos), _unit_stride(sin)
        kernel.backward_kernel[(sum(programs),)](
            *(dy, x, grads[0], w, dy2, x2, grads[-1], w2, cos, sin, sums),
            *(*dy.stride()[:2], *x.stride()[:2], *dy2.stride()[:2], *x2.stride()[:2], cos.stride(0), sin.stride(0)),
            *(x.shape[0], cos.shape[0], programs[0], x.shape[1], x2.shape[1], x.shape[2], cos.shape[1], eps),
            *(_scale(w, unit_offset), weight_grad, tiles, rows, _pairs(x.shape[2])),
            num_warps=_WARPS,
        )
    weight_grads: list[Tensor | None] = [None, None]
    if weight_grad:
        parts = zip(sums.split_with_sizes(programs), heads, strict=True)
        weight_grads = [None if w is None else part.sum(0).to(w.dtype) for part, (_, _, w) in parts] + [None]
    return grads[0], None if k is None else grads[1], weight_grads[0], weight_grads[1]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(dim: int, elements: int = _ELEMENTS) -> int:
    rows: int = max(1, elements // triton.next_power_of_2(dim))
    return rows


def _pairs(dim: int) -> int:
    pairs: int = triton.next_power_of_2((dim + 1) // 2)
    return pairs


def _scale(weight: Tensor | None, unit_offset: bool) -> int:
    return _NO_SCALE if weight is None else _ONE_PLUS_WEIGHT if unit_offset else _WEIGHT
