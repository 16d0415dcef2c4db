"""What GPU there is: constants of a traced graph, since a machine does not change under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["capability_of", "constant", "dotted", "gpu_refusal"]

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
