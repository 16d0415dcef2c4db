"""What GPU there is, and what is installed for it, found out without importing it.

Constants of a traced graph, since a machine does not change under it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from packaging.version import Version

__all__ = ["capability_of", "constant", "dotted", "gpu_refusal", "has_nvcc", "triton_refusal", "version_of"]

_OLDEST_TRITON, _OLDEST_BF16 = (7, 0), (8, 0)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_mark: Any = torch.compiler.assume_constant_result


def constant(function: _Function) -> _Function:
    """Marks a function whose result is a constant of every graph that calls it: tracing a look-up would break it."""
    marked: _Function = _mark(function)
    return marked


def gpu_refusal(what: str, device: torch.device, oldest: tuple[int, int] = (0, 0)) -> str | None:
    """Why something that needs an NVIDIA GPU of a compute capability cannot run on this device; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{what} needs an NVIDIA GPU, the inputs are on {device.type}"
    capability = capability_of(device)
    if capability is not None and capability < oldest:
        return f"{what} needs compute capability {dotted(oldest)} or newer, this GPU has {dotted(capability)}"
    return None


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel that takes bf16, fp16 and fp32 cannot run, with the remedy; None where it can."""
    refusal = gpu_refusal("triton", device, _OLDEST_TRITON)
    if refusal is not None:
        return f"{refusal}; use impl='reference'"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes bf16, fp16 and fp32, got {dtype}; cast the inputs or use impl='reference'"
    if not _has_triton():
        return "triton is not installed; pip install triton or use impl='reference'"
    capability = capability_of(device)
    if capability is not None and capability < _OLDEST_BF16 and dtype == torch.bfloat16:
        return (
            f"bf16 kernels need compute capability {dotted(_OLDEST_BF16)} or newer, this GPU has {dotted(capability)}; "
            "cast to fp16 or use impl='reference'"
        )
    return None


@constant
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None where there is no GPU to ask, which counts as one of today's."""
    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # torch without CUDA, a machine without a GPU
        return None


def dotted(capability: tuple[int, int]) -> str:
    """``"9.0"``"""
    return ".".join(map(str, capability))


@functools.cache
def version_of(*distributions: str) -> Version | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def has_nvcc() -> bool:
    """Whether a CUDA compiler is where TileLang looks for one: its kernels are compiled at their first call."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc") is not None or any((Path(home) / "bin" / "nvcc").exists() for home in homes if home):
        return True
    try:
        return any(file.name == "nvcc" for file in metadata.files("nvidia-cuda-nvcc") or ())
    except metadata.PackageNotFoundError:
        return False
