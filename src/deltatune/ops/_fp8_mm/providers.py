"""What multiplies in fp8, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltatune.ops._nvidia import gpu_refusal
from deltatune.ops._registry import Provider, Spec, Support, otherwise, support

__all__ = ["Fp8MmSpec"]

_OLDEST: Final = (8, 9)
_MULTIPLE: Final = 16


def _torch(spec: Fp8MmSpec) -> Support:
    return support("torch._scaled_mm runs on this device", _refusal(spec))


def _refusal(spec: Fp8MmSpec) -> str | None:
    missing = gpu_refusal("torch._scaled_mm", spec.device, _OLDEST)
    if missing is not None:
        return missing
    if spec.dtype != torch.bfloat16:
        return f"torch._scaled_mm gives rows with a scale each as bfloat16, not {spec.dtype}; cast"
    if spec.shape is not None and any(size % _MULTIPLE for size in spec.shape):
        return f"torch._scaled_mm takes widths that are multiples of {_MULTIPLE}, got a weight {list(spec.shape)}"
    return None


@dataclass(frozen=True)
class Fp8MmSpec(Spec):
    """What the choice for ``fp8_mm`` goes by; ``shape`` is ``[N, K]``."""

    op = "fp8_mm"
    providers = (
        Provider("torch", _torch, "deltatune.ops._fp8_mm.torch_scaled"),
        Provider("reference", otherwise(_torch), "deltatune.ops._fp8_mm.reference"),
    )

    shape: torch.Size | None = None
