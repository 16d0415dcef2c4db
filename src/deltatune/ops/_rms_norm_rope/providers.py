"""What computes the norm of heads and their rotation, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, support, traced_reference

__all__ = ["RmsNormRopeSpec"]


def _triton(spec: RmsNormRopeSpec) -> Support:
    refusal = triton_refusal(spec.device, spec.dtype)
    if refusal is None and spec.angles_grad:
        refusal = "the kernel has no gradient for cos and sin; detach them or use impl='reference'"
    return support(
        "one Triton kernel each way for q and k, compiled or not; 2 passes over memory forward, 3 backward", refusal
    )


@dataclass(frozen=True)
class RmsNormRopeSpec(Spec):
    """What the choice for ``rms_norm_rope`` goes by; ``angles_grad``: whether cos or sin want a gradient."""

    op = "rms_norm_rope"
    providers = (
        Provider("triton", _triton, "deltatune.ops._rms_norm_rope.op"),
        Provider("reference", traced_reference, "deltatune.ops._rms_norm_rope.reference"),
    )

    angles_grad: bool = False
