"""What multiplies groups of rows, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltatune.ops._grouped_mm import torch_grouped
from deltatune.ops._registry import Provider, Spec, Support, otherwise, support

__all__ = ["GroupedMmSpec"]


def _torch(spec: GroupedMmSpec) -> Support:
    refusal = torch_grouped.refusal(spec.device, spec.dtype, spec.weight_shape)
    return support("F.grouped_mm runs on this device", refusal)


@dataclass(frozen=True)
class GroupedMmSpec(Spec):
    """What the choice for ``grouped_mm`` goes by; ``weight_shape`` is ``[G, N, K]``."""

    op = "grouped_mm"
    providers = (
        Provider("torch", _torch, "deltatune.ops._grouped_mm.torch_grouped"),
        Provider("reference", otherwise(_torch), "deltatune.ops._grouped_mm.reference"),
    )

    weight_shape: torch.Size | None = None
