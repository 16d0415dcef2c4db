"""What multiplies in fp8, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltatune.ops._grouped_mm.torch_grouped import MAX_GROUPS
from deltatune.ops._nvidia import capability_of, dotted, gpu_refusal
from deltatune.ops._registry import Provider, Spec, Support, otherwise, support

__all__ = ["Fp8MmSpec"]

_OLDEST: Final = (8, 9)
_GROUPED: Final = 9  # the one generation whose grouped product takes a scale for each row
_MULTIPLE: Final = 16


def _torch(spec: Fp8MmSpec) -> Support:
    return support("torch._scaled_mm runs on this device", _refusal(spec))


def _refusal(spec: Fp8MmSpec) -> str | None:
    missing = gpu_refusal("torch._scaled_mm", spec.device, _OLDEST)
    if missing is not None:
        return missing
    if spec.dtype != torch.bfloat16:
        return f"torch._scaled_mm gives rows with a scale each as bfloat16, not {spec.dtype}; cast"
    if spec.shape is None:
        return None
    if any(size % _MULTIPLE for size in spec.shape[-2:]):
        return f"torch._scaled_mm takes widths that are multiples of {_MULTIPLE}, got a weight {list(spec.shape)}"
    return _grouped_refusal(spec.device, spec.shape[0]) if len(spec.shape) > 2 else None


def _grouped_refusal(device: torch.device, groups: int) -> str | None:
    capability = capability_of(device)
    if capability is not None and capability[0] != _GROUPED:
        needed, found = dotted((_GROUPED, 0)), dotted(capability)
        return f"torch._scaled_grouped_mm needs compute capability {needed}, this GPU has {found}"
    if groups > MAX_GROUPS:
        return f"torch._scaled_grouped_mm takes up to {MAX_GROUPS} groups, got {groups}"
    return None


@dataclass(frozen=True)
class Fp8MmSpec(Spec):
    """What the choice for ``fp8_mm`` goes by; ``shape`` is ``[N, K]``, or ``[G, N, K]`` of groups."""

    op = "fp8_mm"
    providers = (
        Provider("torch", _torch, "deltatune.ops._fp8_mm.torch_scaled"),
        Provider("reference", otherwise(_torch), "deltatune.ops._fp8_mm.reference"),
    )

    shape: torch.Size | None = None
