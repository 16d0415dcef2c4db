"""FLA (flash-linear-attention): the one place that knows its version-dependent calls.

Called below its autograd function and its choice of backends: the pair of functions that its own forward and backward
call, so that ``impl="fla"`` is FLA's kernels even where it would hand over to FlashQLA.
"""

# N tokens of the stream, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from deltatune.ops._gated_delta_rule.documents import Documents
from deltatune.ops._gated_delta_rule.installed import has_nvcc, signature_problem, version_of
from deltatune.ops._gated_delta_rule.library import chunk_states_bytes

__all__ = ["backward", "backward_workspace", "dim_refusal", "forward", "refusal"]

_OLDEST = Version("0.5")
_MAX_HEAD_DIM = 256
_INPUTS = ("q", "k", "v", "g", "beta")
_PACKING = ("cu_seqlens", "chunk_indices")
_FORWARD = (*_INPUTS, "scale", "initial_state", "output_final_state", *_PACKING)
_BACKWARD = (*_INPUTS, "A", "scale", "initial_state", "do", "dht", *_PACKING)
_FORWARD_RESULTS = 6  # g_cum, o, A, final state, initial state, g
_BACKWARD_RESULTS = 8  # dq, dk, dv, dbeta, dg, and gradients of what is not passed


class _Library(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why FLA cannot run on a GPU of this compute capability, with the remedy; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return (
            f"FLA takes float16 and bfloat16 here, not {dtype}: it would round to tf32; cast, or use impl='reference'"
        )
    if capability < (8, 0):
        return f"FLA needs compute capability 8.0 or newer, this GPU has {_dotted(capability)}; use impl='reference'"
    version = version_of("fla-core", "flash-linear-attention")
    if version is None:
        return "FLA is not installed: pip install 'flash-linear-attention>=0.6'"
    if version < _OLDEST:
        return (
            f"FLA {version} is older than {_OLDEST}, and silently wrong on some GPUs: "
            "pip install 'flash-linear-attention>=0.6'"
        )
    return _miscompiled(capability, version) or _signature_problem()


def dim_refusal(key_dim: int, value_dim: int) -> str | None:
    """Why FLA cannot run heads of these sizes; None where it can."""
    if all(dim % 16 == 0 and 0 < dim <= _MAX_HEAD_DIM for dim in (key_dim, value_dim)):
        return None
    return (
        f"FLA takes head dims that are multiples of 16 up to {_MAX_HEAD_DIM}, got K={key_dim} and V={value_dim}; "
        "use impl='reference'"
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``o``, and what backward wants of it: the decay summed inside chunks ``[1, N, G]``, ``A`` ``[1, N, G, 64]``.

    Args:
        q: ``[1, N, H, K]``, normalised where that is wanted, contiguous like all inputs.
        k: ``[1, N, H, K]``.
        v: ``[1, N, G, V]``.
        g: ``[1, N, G]`` fp32.
        beta: ``[1, N, G]``.
        documents: of the stream.
        scale: of q.
    """
    results = _library().forward(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=None,
        output_final_state=False,
        cu_seqlens=documents.cu_seqlens,
        chunk_indices=documents.chunk_indices,
    )
    decay, o, solved, *_ = _counted("forward", results, _FORWARD_RESULTS)
    return o, decay, solved


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    solved: Tensor,
    documents: Documents,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g and beta, of the inputs and with the results of ``forward``."""
    results = _library().backward(
        q=q,
        k=k,
        v=v,
        g=decay,
        beta=beta,
        A=solved,
        scale=scale,
        initial_state=None,
        do=do,
        dht=None,
        cu_seqlens=documents.cu_seqlens,
        chunk_indices=documents.chunk_indices,
    )
    dq, dk, dv, dbeta, dg, *_ = _counted("backward", results, _BACKWARD_RESULTS)
    return dq, dk, dv, dg, dbeta


def backward_workspace(q: Tensor, v: Tensor) -> int:
    """Bytes inside ``backward``: states and their gradients; w, dw, a second dk, u and the new and updated values."""
    tokens, heads = v.shape[0] * v.shape[1], v.shape[2]
    wide_keys = 3 + 2 * (heads > q.shape[2])  # where value heads share keys, dq and dk of every value head too
    rows = tokens * heads * v.itemsize * (wide_keys * q.shape[3] + 3 * v.shape[3])
    return 2 * chunk_states_bytes(q, v) + rows


@functools.cache
def _library() -> _Library:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    return _Library(chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd)


@functools.cache
def _signature_problem() -> str | None:
    remedy = "use FLA 0.5 or 0.6: pip install 'flash-linear-attention>=0.6,<0.7'"
    try:
        library = _library()
    except ImportError as error:
        return f"FLA {version_of('fla-core')} cannot be imported ({error}); {remedy}"
    problem = signature_problem(library.forward, _FORWARD) or signature_problem(library.backward, _BACKWARD)
    return problem and f"FLA {version_of('fla-core')} is not the one known here: its {problem}; {remedy}"


def _miscompiled(capability: tuple[int, int], version: Version) -> str | None:
    """Triton 3.4 to 3.7.0 miscompiles one kernel of the backward for Hopper, where FLA 0.6 runs TileLang's instead."""
    triton = version_of("triton", "pytorch-triton")
    fixed = triton is not None and triton >= Version("3.7.1") and version >= Version("0.5.2")
    if capability[0] != 9 or triton is None or triton < Version("3.4") or fixed:
        return None
    what = f"FLA {version} with Triton {triton} computes wrong gradients on Hopper"
    if version < Version("0.6") or version_of("tilelang") is None:
        return f"{what}: pip install 'flash-linear-attention>=0.6' 'tilelang>=0.1.12', or Triton 3.7.1 or newer"
    if not has_nvcc():
        return f"{what} and finds no nvcc for TileLang's kernel: install the CUDA toolkit, or Triton 3.7.1 or newer"
    if os.environ.get("FLA_TILELANG") == "0" or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return f"{what} without TileLang's kernel: unset FLA_TILELANG and FLA_DISABLE_BACKEND_DISPATCH"
    return None


def _counted(what: str, results: tuple[Any, ...], expected: int) -> tuple[Any, ...]:
    if len(results) != expected:
        raise RuntimeError(
            f"FLA {version_of('fla-core')} returns {len(results)} results from its {what} where {expected} are "
            "expected: pip install 'flash-linear-attention>=0.6,<0.7', or use impl='reference'"
        )
    return results


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
