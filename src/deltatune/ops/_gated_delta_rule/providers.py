"""What computes the gated delta rule, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch

from deltatune.ops._gated_delta_rule import fla, flash_qla
from deltatune.ops._nvidia import capability_of, constant, gpu_refusal
from deltatune.ops._registry import Provider, Spec, Support, support

__all__ = ["GatedDeltaRuleSpec"]


def _flash_qla(spec: GatedDeltaRuleSpec) -> Support:
    return support(
        f"FlashQLA's fused kernels for this GPU, head dims of 128{_states(spec)}", _refusal("flash_qla", spec)
    )


def _fla(spec: GatedDeltaRuleSpec) -> Support:
    return support(f"FLA's Triton kernels{_states(spec)}", _refusal("fla", spec))


def _reference(spec: GatedDeltaRuleSpec) -> Support:
    accumulation = "fp64" if spec.dtype == torch.float64 else "fp32"
    return Support(True, f"chunked torch on {spec.device.type}, accumulating in {accumulation}{_states(spec)}")


def _states(spec: GatedDeltaRuleSpec) -> str:
    return ", states in and out" if spec.state else ""


_LIBRARIES: dict[str, ModuleType] = {"flash_qla": flash_qla, "fla": fla}


def _refusal(name: str, spec: GatedDeltaRuleSpec) -> str | None:
    refusal = _library_refusal(name, spec.device, spec.dtype)
    if refusal is None and spec.head_dims is not None:
        refusal = _LIBRARIES[name].dim_refusal(*spec.head_dims)
    return refusal


@constant
def _library_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    missing = gpu_refusal(name, device)
    if missing is None:
        capability = capability_of(device)
        if capability is not None:
            refusal: str | None = _LIBRARIES[name].refusal(capability, dtype)
            return refusal
        missing = f"{name} needs an NVIDIA GPU, and there is none"
    return f"{missing}; use impl='reference'"


@dataclass(frozen=True)
class GatedDeltaRuleSpec(Spec):
    """What the choice for ``gated_delta_rule`` goes by; ``head_dims`` are K and V."""

    op: ClassVar[str] = "gated_delta_rule"
    providers: ClassVar[tuple[Provider, ...]] = (
        Provider("flash_qla", _flash_qla, "deltatune.ops._gated_delta_rule.flash_qla"),
        Provider("fla", _fla, "deltatune.ops._gated_delta_rule.fla"),
        Provider("reference", _reference, "deltatune.ops._gated_delta_rule.reference"),
    )

    head_dims: tuple[int, int] | None = None
    state: bool = False  # goes in or out
