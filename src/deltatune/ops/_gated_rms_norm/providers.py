"""What computes the gated norm, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, support, traced_reference

__all__ = ["GatedRmsNormSpec"]


def _triton(spec: Spec) -> Support:
    refusal = triton_refusal(spec.device, spec.dtype)
    return support("one Triton kernel each way, compiled or not; 3 passes over memory forward, 5 backward", refusal)


@dataclass(frozen=True)
class GatedRmsNormSpec(Spec):
    """What the choice for ``gated_rms_norm`` goes by."""

    op = "gated_rms_norm"
    providers = (
        Provider("triton", _triton, "deltatune.ops._gated_rms_norm.op"),
        Provider("reference", traced_reference, "deltatune.ops._gated_rms_norm.reference"),
    )
