"""torch's own varlen attention (FlashAttention-2 inside): the one place that knows its version-dependent calls.

Its forward and backward are operators of torch's own; what is called here is that pair, since ours has its autograd
formula one level up. torch 2.12 added ``enable_gqa`` to the forward, needed there for fewer key heads than query heads.
"""

# S tokens of the stream, N query heads, M key heads, D head dim

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators
from torch import Tensor

from deltatune.ops._numerics import unit_stride
from deltatune.ops._nvidia import gpu_refusal
from deltatune.ops._varlen_attention.pairs import Pairs

__all__ = ["backward", "backward_workspace", "forward", "refusal"]

_OLDEST = (8, 0)
_MAX_HEAD_DIM = 256
_FORWARD = "query key value cu_seq_q cu_seq_k max_q max_k is_causal scale window_size"
_BACKWARD = "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale window_size"


def _argument_names(op: str) -> list[str]:
    packet = getattr(torch.ops.torch_attn, op, None)
    return [] if packet is None else [argument.name for argument in packet.default._schema.arguments]


def _signature_problem() -> str | None:
    for op, expected in (("_varlen_attn", _FORWARD.split()), ("_varlen_attn_backward", _BACKWARD.split())):
        found = _argument_names(op)
        if found[: len(expected)] != expected:
            return (
                f"torch {torch.__version__} has torch_attn::{op}({', '.join(found)}) where "
                f"({', '.join(expected)}, ...) is expected; use torch 2.11 to 2.13, or impl='reference'"
            )
    return None


_SIGNATURE_PROBLEM = _signature_problem()
_GROUPED: dict[str, bool] = {"enable_gqa": True} if "enable_gqa" in _argument_names("_varlen_attn") else {}


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why this implementation cannot run here; None where it can."""
    missing = gpu_refusal("torch's varlen attention", device, _OLDEST)
    if missing is not None:
        return missing
    if dtype not in (torch.float16, torch.bfloat16):
        return f"torch's varlen attention takes float16 and bfloat16, not {dtype}; cast"
    if head_dim is not None and (head_dim % 8 or head_dim > _MAX_HEAD_DIM):
        return (
            f"torch's varlen attention takes a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, got {head_dim}"
        )
    return _SIGNATURE_PROBLEM


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``o`` like ``q`` and the natural-log normaliser ``lse`` ``[N, S]`` fp32.

    A sink grows the normaliser, ``lse' = log(exp(lse) + exp(sink))``, and shrinks the output by ``exp(lse - lse')``.
    Backward computes weights from the normaliser and their mean gradient from the output, so both are all it needs.
    """
    q, k, v = (unit_stride(x) for x in (q, k, v))
    lengths, options = _arguments(pairs)
    o, lse, _ = torch.ops.torch_attn._varlen_attn(q, k, v, *lengths, *options, **_GROUPED)
    if sinks is None:
        return o.contiguous(), lse.contiguous()
    whole = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
    return (o * (lse - whole).exp().mT.unsqueeze(-1)).to(o.dtype).contiguous(), whole.contiguous()


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv``; deterministic only under ``torch.use_deterministic_algorithms(True)``."""
    assert dlse is None, "refused by the provider"
    do, q, k, v = (unit_stride(x) for x in (do, q, k, v))
    lengths, options = _arguments(pairs)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.torch_attn._varlen_attn_backward(do, q, k, v, o, lse, *lengths, no_dropout, *options)
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def backward_workspace(q: Tensor, k: Tensor) -> int:
    """Bytes inside ``backward``: dq in fp32 and, where query heads share keys, dk and dv of every query head."""
    return q.numel() * (4 + 2 * q.itemsize * (q.shape[1] > k.shape[1]))


def _arguments(pairs: Pairs) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """``cu_seq_q, cu_seq_k, max_q, max_k, is_causal`` and ``scale, window_size`` of both operators.

    Boundaries go without their repeated tail: the kernel's grid is documents x blocks of the longest one, and with the
    tail it would launch T times too many. A window is keys to the left and right of a query, itself not counted.
    """
    total = int(pairs.cu_seqlens_cpu[-1])
    documents = int((pairs.cu_seqlens_cpu < total).sum())
    boundaries = pairs.cu_seqlens[: documents + 1].contiguous()
    longest = int(pairs.cu_seqlens_cpu.diff().max())
    window_size = [-1 if pairs.window is None else pairs.window - 1, 0]  # -1 is no limit
    return (boundaries, boundaries, longest, longest, pairs.window is None), (pairs.scale, window_size)
