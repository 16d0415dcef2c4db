"""The ops: each validates its inputs, chooses an implementation and calls it.

Every op has a folder of its own: ``api.py`` holds the documentation and the validation, ``providers.py`` the
implementations and where each runs, ``reference.py`` the specification, ``op.py`` the ``torch.library`` registration
where an implementation is opaque to the compiler. ``choose(spec)`` says which implementation ``impl="auto"`` takes and
why, for the op's own spec such as ``CausalConvSpec(device, dtype)``.
"""

from __future__ import annotations

from deltatune.ops._causal_conv.api import causal_conv
from deltatune.ops._causal_conv.providers import CausalConvSpec
from deltatune.ops._dequantize.api import dequantize
from deltatune.ops._dequantize.providers import DequantizeSpec
from deltatune.ops._dequantize.quantize import quantize
from deltatune.ops._dequantize.weight import QuantizedWeight
from deltatune.ops._fp8_mm.api import fp8_mm
from deltatune.ops._fp8_mm.providers import Fp8MmSpec
from deltatune.ops._gated_delta_rule.api import gated_delta_rule
from deltatune.ops._gated_delta_rule.providers import GatedDeltaRuleSpec
from deltatune.ops._gated_rms_norm.api import gated_rms_norm
from deltatune.ops._gated_rms_norm.providers import GatedRmsNormSpec
from deltatune.ops._grouped_mm.api import grouped_linear
from deltatune.ops._grouped_mm.experts import ExpertLinear, moe_experts
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._linear_cross_entropy.api import linear_cross_entropy
from deltatune.ops._linear_cross_entropy.providers import LinearCrossEntropySpec
from deltatune.ops._lora_gated.api import lora_gated
from deltatune.ops._lora_gated.providers import LoraGatedSpec
from deltatune.ops._lora_linear.api import Adapter
from deltatune.ops._registry import Choice, Provider, Spec, Support, choose
from deltatune.ops._rms_norm_rope.api import rms_norm_rope, rms_norm_rope_pair
from deltatune.ops._rms_norm_rope.providers import RmsNormRopeSpec
from deltatune.ops._varlen_attention.api import varlen_attention
from deltatune.ops._varlen_attention.providers import VarlenAttentionSpec

__all__ = [
    "Adapter",
    "CausalConvSpec",
    "Choice",
    "DequantizeSpec",
    "ExpertLinear",
    "Fp8MmSpec",
    "GatedDeltaRuleSpec",
    "GatedRmsNormSpec",
    "GroupedMmSpec",
    "LinearCrossEntropySpec",
    "LoraGatedSpec",
    "Provider",
    "QuantizedWeight",
    "RmsNormRopeSpec",
    "Spec",
    "Support",
    "VarlenAttentionSpec",
    "causal_conv",
    "choose",
    "dequantize",
    "fp8_mm",
    "gated_delta_rule",
    "gated_rms_norm",
    "grouped_linear",
    "linear_cross_entropy",
    "lora_gated",
    "moe_experts",
    "quantize",
    "rms_norm_rope",
    "rms_norm_rope_pair",
    "varlen_attention",
]
