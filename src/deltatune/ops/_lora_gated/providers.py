"""What computes a gated activation of layers with adapters, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, support

__all__ = ["LoraGatedSpec"]

#: Columns of one layer's adapters that the kernels hold at once.
_WIDEST: Final = 64
#: Up to how many columns ``"auto"`` takes the kernels. At 16 they are ahead of the compiled reference (4% at 6144
#: outputs, 2% at 12288, forward and backward on an H200), at 64 behind it; fewer than 16 cost what 16 do.
_PAYS: Final = 16


def _triton(spec: LoraGatedSpec) -> Support:
    refusal = triton_refusal(spec.device, spec.dtype)
    if refusal is None and spec.dtype not in (torch.bfloat16, torch.float16):
        refusal = f"the kernels take bf16 and fp16, got {spec.dtype}; cast the inputs or use impl='reference'"
    if refusal is None and spec.width is not None and spec.width > _WIDEST:
        refusal = f"the kernels take up to {_WIDEST} columns of a layer's adapters, got {spec.width}"
    return support("the adapters' part of gate and up is added where the activation reads them", refusal)


def _reference(spec: LoraGatedSpec) -> Support:
    return support(f"products that add to their adapters', on {spec.device.type}; Inductor fuses the activation")


@dataclass(frozen=True)
class LoraGatedSpec(Spec):
    """What the choice for ``lora_gated`` goes by; ``width`` is the sum of the ranks of the layer with more of them."""

    op = "lora_gated"
    providers = (
        Provider("triton", _triton, "deltatune.ops._lora_gated.sums"),
        Provider("reference", _reference, "deltatune.ops._lora_gated.reference"),
    )

    width: int | None = None

    def preferred(self) -> tuple[Provider, ...]:
        """The kernels first where they are known to pay."""
        kernels, reference = self.providers
        return (kernels, reference) if self.width is not None and self.width <= _PAYS else (reference, kernels)
