"""What computes attention over packed documents, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.ops._registry import Provider, Spec, Support, otherwise, support
from deltatune.ops._varlen_attention import torch_varlen

__all__ = ["VarlenAttentionSpec"]


def _torch(spec: VarlenAttentionSpec) -> Support:
    refusal = torch_varlen.refusal(spec.device, spec.dtype, spec.head_dim)
    if refusal is None and spec.lse:
        refusal = "torch's varlen attention has no gradient through lse"
    if refusal is None and spec.kv_sequences:
        refusal = "torch's varlen attention runs here with one set of boundaries for q, k and v"
    return support("torch's varlen attention runs on this device", refusal)


@dataclass(frozen=True)
class VarlenAttentionSpec(Spec):
    """What the choice for ``varlen_attention`` goes by; ``head_dim`` is D, the others as the op takes them."""

    op = "varlen_attention"
    providers = (
        Provider("torch", _torch, "deltatune.ops._varlen_attention.torch_varlen"),
        Provider("reference", otherwise(_torch), "deltatune.ops._varlen_attention.reference"),
    )

    head_dim: int | None = None
    kv_sequences: bool = False
    lse: bool = False
