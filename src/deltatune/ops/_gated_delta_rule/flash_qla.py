"""FlashQLA: the one place that knows its version-dependent calls.

Its documented pair of low-level functions, without context parallelism: choosing one reads boundaries from the device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from deltatune.ops._gated_delta_rule.library import Boundaries, Call, Library, chunk_states_bytes
from deltatune.ops._nvidia import dotted, has_nvcc, version_of

__all__ = ["LIBRARY", "backward_workspace", "dim_refusal", "refusal"]

_OLDEST, _OLDEST_TILELANG = Version("0.1.3"), Version("0.1.12")
_CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # those with kernels of both directions
_HEAD_DIM = 128


@functools.cache
def _load() -> dict[str, Callable[..., Any]]:
    from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
    from flash_qla.utils.index import prepare_varlen_metadata

    return {
        "forward": chunk_gated_delta_rule_fwd,
        "backward": chunk_gated_delta_rule_bwd,
        "prepare": prepare_varlen_metadata,
    }


_DESCRIBED: weakref.WeakSet[Boundaries] = weakref.WeakSet()


def _describe(documents: Boundaries) -> None:
    """Hands FlashQLA the chunks of these boundaries, which it would otherwise wait for the device to count."""
    if documents not in _DESCRIBED:
        _load()["prepare"](documents.cu_seqlens, documents.cu_seqlens_cpu)
        _DESCRIBED.add(documents)


_INPUTS = ("q", "k", "v", "g", "beta", "scale", "cu_seqlens")
LIBRARY = Library(
    "FlashQLA",
    "flash-qla",
    known="the version known here",
    pip=f"pip install 'flash-qla=={_OLDEST}'",
    load=_load,
    calls={
        "forward": Call(
            _INPUTS,
            {"initial_state": None, "output_final_state": False, "output_h": False, "auto_cp": False},
            ("g", "A", "o", "", "final_state", ""),  # and h and a cache
        ),
        "backward": Call(
            (*_INPUTS, "A", "do"),
            {"initial_state": None, "dht": None, "auto_cp": False},
            ("dq", "dk", "dv", "dbeta", "dg", "dh0"),
        ),
        "prepare": Call(("cu_seqlens", "cu_seqlens_cpu"), {}, ()),
    },
    describe=_describe,
)


def refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why FlashQLA cannot run on a GPU of this compute capability, with the remedy; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashQLA takes float16 and bfloat16, not {dtype}; cast, or use impl='reference'"
    if capability not in _CAPABILITIES:
        known, found = ", ".join(map(dotted, _CAPABILITIES)), dotted(capability)
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
    return LIBRARY.problem


def dim_refusal(key_dim: int, value_dim: int) -> str | None:
    """Why FlashQLA cannot run heads of these sizes; None where it can."""
    if (key_dim, value_dim) == (_HEAD_DIM, _HEAD_DIM):
        return None
    return f"FlashQLA takes head dims of {_HEAD_DIM}, got K={key_dim} and V={value_dim}; use impl='fla' or 'reference'"


def backward_workspace(q: Tensor, v: Tensor) -> int:
    """Bytes inside backward: states, and where value heads share keys, dq and dk of every value head.

    Their sums replace them one after the other: the second is not there yet.
    """
    heads = 2 * v.shape[2] - q.shape[2] if v.shape[2] > q.shape[2] else 0
    return chunk_states_bytes(q, v) + heads * q.numel() // q.shape[2] * q.itemsize
