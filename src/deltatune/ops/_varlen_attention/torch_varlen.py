"""torch's own varlen attention (FlashAttention-2 inside): the one place that knows its version-dependent calls.

Its forward and backward are operators of torch's own; what is called here is that pair, since ours has its autograd
formula one level up. torch 2.12 added ``enable_gqa`` to the forward, needed there for fewer key heads than query heads.
"""

# S tokens of the stream, N query heads, M key heads, D head dim

from __future__ import annotations

import torch
import torch.nn.attention.varlen  # registers the operators
from torch import Tensor

from deltatune.ops._nvidia import capability_of, dotted, gpu_refusal

__all__ = ["backward", "backward_workspace", "forward", "refusal"]

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
    missing = gpu_refusal("torch's varlen attention", device)
    if missing is not None:
        return missing
    if dtype not in (torch.float16, torch.bfloat16):
        return f"torch's varlen attention takes float16 and bfloat16, not {dtype}; cast"
    if head_dim is not None and (head_dim % 8 or head_dim > _MAX_HEAD_DIM):
        return (
            f"torch's varlen attention takes a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, got {head_dim}"
        )
    capability = capability_of(device)
    if capability is not None and capability < (8, 0):
        return f"torch's varlen attention needs compute capability 8.0 or newer, this GPU has {dotted(capability)}"
    return _SIGNATURE_PROBLEM


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``o`` like ``q`` and the natural-log normaliser ``lse`` ``[N, S]`` fp32.

    A sink grows the normaliser, ``lse' = log(exp(lse) + exp(sink))``, and shrinks the output by ``exp(lse - lse')``.
    Backward computes weights from the normaliser and their mean gradient from the output, so both are all it needs.
    """
    boundaries, longest = _trimmed(cu_seqlens, cu_seqlens_cpu)
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    o, lse, _ = torch.ops.torch_attn._varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest, window is None, scale, _window_size(window), **_GROUPED
    )
    if sinks is None:
        return o.contiguous(), lse.contiguous()
    whole = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
    return (o * (lse - whole).exp().mT.unsqueeze(-1)).to(o.dtype).contiguous(), whole.contiguous()


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv``; deterministic only under ``torch.use_deterministic_algorithms(True)``."""
    boundaries, longest = _trimmed(cu_seqlens, cu_seqlens_cpu)
    do, q, k, v = (_dense_heads(x) for x in (do, q, k, v))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        do,
        q,
        k,
        v,
        o,
        lse,
        boundaries,
        boundaries,
        longest,
        longest,
        window is None,
        no_dropout,
        scale,
        _window_size(window),
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def backward_workspace(q: Tensor, k: Tensor) -> int:
    """Bytes inside ``backward``: dq in fp32 and, where query heads share keys, dk and dv of every query head."""
    return q.numel() * (4 + 2 * q.itemsize * (q.shape[1] > k.shape[1]))


def _trimmed(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor) -> tuple[Tensor, int]:
    """The boundaries without their repeated tail, and the longest document.

    The kernel's grid is documents x blocks of the longest one: an untrimmed tail would launch T times too many.
    """
    total = int(cu_seqlens_cpu[-1])
    documents = int((cu_seqlens_cpu < total).sum())
    return cu_seqlens[: documents + 1].contiguous(), int(cu_seqlens_cpu.diff().max())


def _window_size(window: int | None) -> list[int]:
    """Keys to the left and right of a query, itself not counted; -1 is no limit."""
    return [-1, 0] if window is None else [window - 1, 0]


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels read any strides of tokens and heads, but a head's numbers must lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()
