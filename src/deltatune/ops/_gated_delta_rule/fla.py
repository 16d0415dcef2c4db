"""FLA (flash-linear-attention): the one place that knows its version-dependent calls.

Called below its autograd function and its choice of backends: the pair of functions that its own forward and backward
call, so that ``impl="fla"`` is FLA's kernels even where it would hand over to FlashQLA.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from deltatune.ops._gated_delta_rule.library import Call, Library, chunk_states_bytes
from deltatune.ops._nvidia import dotted, has_nvcc, version_of

__all__ = ["LIBRARY", "backward_workspace", "dim_refusal", "refusal"]

_OLDEST = Version("0.5")
_MAX_HEAD_DIM = 256


@functools.cache
def _load() -> dict[str, Callable[..., Any]]:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    return {"forward": chunk_gated_delta_rule_fwd, "backward": chunk_gated_delta_rule_bwd}


_INPUTS = ("q", "k", "v", "g", "beta", "scale", "cu_seqlens", "chunk_indices")
LIBRARY = Library(
    "FLA",
    "fla-core",
    known="FLA 0.5 or 0.6",
    pip="pip install 'flash-linear-attention>=0.6,<0.7'",
    load=_load,
    calls={
        "forward": Call(
            _INPUTS,
            {"initial_state": None, "output_final_state": False},
            ("g", "o", "A", "final_state", *("",) * 2),  # and the initial state and g
        ),
        "backward": Call(
            (*_INPUTS, "A", "do"),
            {"initial_state": None, "dht": None},
            ("dq", "dk", "dv", "dbeta", "dg", "dh0", *("",) * 2),  # and gradients of what is not passed
        ),
    },
)


def refusal(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why FLA cannot run on a GPU of this compute capability, with the remedy; None where it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return (
            f"FLA takes float16 and bfloat16 here, not {dtype}: it would round to tf32; cast, or use impl='reference'"
        )
    if capability < (8, 0):
        return f"FLA needs compute capability 8.0 or newer, this GPU has {dotted(capability)}; use impl='reference'"
    version = version_of("fla-core", "flash-linear-attention")
    if version is None:
        return "FLA is not installed: pip install 'flash-linear-attention>=0.6'"
    if version < _OLDEST:
        return (
            f"FLA {version} is older than {_OLDEST}, and silently wrong on some GPUs: "
            "pip install 'flash-linear-attention>=0.6'"
        )
    return _miscompiled(capability, version) or LIBRARY.problem


def dim_refusal(key_dim: int, value_dim: int) -> str | None:
    """Why FLA cannot run heads of these sizes; None where it can."""
    if all(dim % 16 == 0 and 0 < dim <= _MAX_HEAD_DIM for dim in (key_dim, value_dim)):
        return None
    return (
        f"FLA takes head dims that are multiples of 16 up to {_MAX_HEAD_DIM}, got K={key_dim} and V={value_dim}; "
        "use impl='reference'"
    )


def backward_workspace(q: Tensor, v: Tensor) -> int:
    """Bytes inside backward: states and their gradients; w, dw, a second dk, u and the new and updated values.

    Where value heads share keys, dq and dk of every value head come before their sums.
    """
    (*rows, key_heads, key_dim), (heads, value_dim) = q.shape, v.shape[2:]
    columns = heads * 3 * (key_dim + value_dim) + 2 * (heads - key_heads) * key_dim
    return 2 * chunk_states_bytes(q, v) + math.prod(rows) * columns * v.itemsize


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
