"""FlashQLA: the one place that knows its version-dependent calls.

Its documented pair of low-level functions, without context parallelism: choosing one reads boundaries from the device.
"""

# N tokens of the stream, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from deltatune.ops._gated_delta_rule.documents import Documents
from deltatune.ops._gated_delta_rule.installed import has_nvcc, signature_problem, version_of
from deltatune.ops._gated_delta_rule.library import chunk_states_bytes

__all__ = ["backward", "backward_workspace", "dim_refusal", "forward", "refusal"]

_OLDEST, _OLDEST_TILELANG = Version("0.1.3"), Version("0.1.12")
_CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # those with kernels of both directions
_HEAD_DIM = 128
_INPUTS = ("q", "k", "v", "g", "beta")
_OPTIONS = ("scale", "cu_seqlens", "auto_cp")
_FORWARD = (*_INPUTS, *_OPTIONS, "output_final_state", "output_h")
_BACKWARD = (*_INPUTS, *_OPTIONS, "A", "do")
_METADATA = ("cu_seqlens", "cu_seqlens_cpu")
_FORWARD_RESULTS = 6  # g_cum, A, o, h, final state, cache
_BACKWARD_RESULTS = 6  # dq, dk, dv, dbeta, dg, gradient of an initial state


class _Library(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    prepare: Callable[..., Any]


def refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why FlashQLA cannot run on a GPU of this compute capability, with the remedy; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashQLA takes float16 and bfloat16, not {dtype}; cast, or use impl='reference'"
    if capability not in _CAPABILITIES:
        known, found = (", ".join(".".join(map(str, x)) for x in some) for some in (_CAPABILITIES, [capability]))
        return f"FlashQLA trains on compute capabilities {known}, this GPU has {found}; use impl='fla' or 'reference'"
    version, tilelang = version_of("flash-qla"), version_of("tilelang")
    if version is None or version < _OLDEST:
        found = "is not installed" if version is None else f"{version} is older than {_OLDEST}"
        return f"FlashQLA {found}: pip install 'flash-qla>={_OLDEST}'"
    if tilelang is None or tilelang < _OLDEST_TILELANG:
        found = "TileLang is not installed" if tilelang is None else f"TileLang {tilelang} is older"
        return f"FlashQLA needs TileLang {_OLDEST_TILELANG}, {found}: pip install 'tilelang>={_OLDEST_TILELANG}'"
    if not has_nvcc():
        return "FlashQLA compiles its kernels and finds no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    return _signature_problem()


def dim_refusal(key_dim: int, value_dim: int) -> str | None:
    """Why FlashQLA cannot run heads of these sizes; None where it can."""
    if (key_dim, value_dim) == (_HEAD_DIM, _HEAD_DIM):
        return None
    return f"FlashQLA takes head dims of {_HEAD_DIM}, got K={key_dim} and V={value_dim}; use impl='fla' or 'reference'"


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
    _describe(documents)
    results = _library().forward(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        cu_seqlens=documents.cu_seqlens,
        output_final_state=False,
        output_h=False,
        auto_cp=False,
    )
    decay, solved, o, *_ = _counted("forward", results, _FORWARD_RESULTS)
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
    _describe(documents)
    results = _library().backward(
        q=q,
        k=k,
        v=v,
        g=decay,
        beta=beta,
        A=solved,
        do=do,
        scale=scale,
        cu_seqlens=documents.cu_seqlens,
        auto_cp=False,
    )
    dq, dk, dv, dbeta, dg, _ = _counted("backward", results, _BACKWARD_RESULTS)
    return dq, dk, dv, dg, dbeta


def backward_workspace(q: Tensor, v: Tensor) -> int:
    """Bytes inside ``backward``: states, and where value heads share keys, dq and dk of every value head."""
    expanded = 2 * v.shape[:3].numel() * q.shape[3] * q.itemsize * (v.shape[2] > q.shape[2])
    return chunk_states_bytes(q, v) + expanded


_DESCRIBED: weakref.WeakSet[Documents] = weakref.WeakSet()


def _describe(documents: Documents) -> None:
    """Hands FlashQLA the chunks of these boundaries, which it would otherwise wait for the device to count."""
    if documents not in _DESCRIBED:
        _library().prepare(documents.cu_seqlens, documents.cu_seqlens_cpu)
        _DESCRIBED.add(documents)


@functools.cache
def _library() -> _Library:
    from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
    from flash_qla.utils.index import prepare_varlen_metadata

    return _Library(chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd, prepare_varlen_metadata)


@functools.cache
def _signature_problem() -> str | None:
    remedy = f"use the version known here: pip install 'flash-qla=={_OLDEST}'"
    try:
        library = _library()
    except ImportError as error:
        return f"FlashQLA {version_of('flash-qla')} cannot be imported ({error}); {remedy}"
    wanted = zip(library, (_FORWARD, _BACKWARD, _METADATA), strict=True)
    problem = next(filter(None, (signature_problem(function, names) for function, names in wanted)), None)
    return problem and f"FlashQLA {version_of('flash-qla')} is not the one known here: its {problem}; {remedy}"


def _counted(what: str, results: tuple[Any, ...], expected: int) -> tuple[Any, ...]:
    if len(results) != expected:
        raise RuntimeError(
            f"FlashQLA {version_of('flash-qla')} returns {len(results)} results from its {what} where {expected} are "
            f"expected: pip install 'flash-qla=={_OLDEST}', or use impl='reference'"
        )
    return results
