"""Whether this package's own Triton kernels can run, found out without importing triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["triton_refusal"]


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel that takes bf16, fp16 and fp32 cannot run, with the remedy; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"triton needs an NVIDIA GPU, the inputs are on {device.type}; use impl='reference'"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes bf16, fp16 and fp32, got {dtype}; cast the inputs or use impl='reference'"
    if not _has_triton():
        return "triton is not installed; pip install triton or use impl='reference'"
    return None


def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# What is installed does not change under a graph, and tracing the look-up would break it.
_assume_constant: Any = torch.compiler.assume_constant_result
_has_triton: Callable[[], bool] = _assume_constant(_find_triton)
