"""What computes the convolution, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, support, traced_reference

__all__ = ["CausalConvSpec"]

_MAX_WIDTH = 8  # the kernel keeps the window in registers


def _triton(spec: CausalConvSpec) -> Support:
    refusal = triton_refusal(spec.device, spec.dtype)
    if refusal is None and spec.width is not None and spec.width > _MAX_WIDTH:
        refusal = f"the kernel takes widths up to {_MAX_WIDTH}, got {spec.width}; use impl='reference'"
    if refusal is None and spec.left:
        refusal = "the kernel begins every sequence with zeros, it takes no left; use impl='reference'"
    return support("one Triton kernel, resets inside; 2 passes over memory forward, 3 backward", refusal)


@dataclass(frozen=True)
class CausalConvSpec(Spec):
    """What the choice for ``causal_conv`` goes by; ``width`` is W, ``left`` whether there is such an argument."""

    op = "causal_conv"
    providers = (
        Provider("triton", _triton, "deltatune.ops._causal_conv.op"),
        Provider("reference", traced_reference, "deltatune.ops._causal_conv.reference"),
    )

    width: int | None = None
    left: bool = False
