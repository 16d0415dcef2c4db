"""What decodes quantised matrices, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, otherwise, support

__all__ = ["DequantizeSpec"]


def _triton(spec: Spec) -> Support:
    return support("one pass over memory for every format", triton_refusal(spec.device, spec.dtype))


@dataclass(frozen=True)
class DequantizeSpec(Spec):
    """What the choice for ``dequantize`` goes by; ``dtype`` is that of the result."""

    op = "dequantize"
    providers = (
        Provider("triton", _triton, "deltatune.ops._dequantize.kernel"),
        Provider("reference", otherwise(_triton), "deltatune.ops._dequantize.reference"),
    )
