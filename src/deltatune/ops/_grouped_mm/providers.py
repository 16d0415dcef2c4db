"""What multiplies groups of rows, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltatune.ops._grouped_mm import torch_grouped
from deltatune.ops._registry import Provider, Spec, Support, support

__all__ = ["GroupedMmSpec"]


def _torch(spec: GroupedMmSpec) -> Support:
    refusal = torch_grouped.refusal(spec.device, spec.dtype, spec.weight_shape)
    return support("F.grouped_mm runs on this device", refusal)


def _reference(spec: GroupedMmSpec) -> Support:
    return Support(True, _torch(spec).reason)  # there is no other reason to take it


@dataclass(frozen=True)
class GroupedMmSpec(Spec):
    """What the choice for ``grouped_mm`` goes by; ``weight_shape`` is ``[G, N, K]``."""

    op: ClassVar[str] = "grouped_mm"
    providers: ClassVar[tuple[Provider, ...]] = (
        Provider("torch", _torch, "deltatune.ops._grouped_mm.torch_grouped"),
        Provider("reference", _reference, "deltatune.ops._grouped_mm.reference"),
    )

    weight_shape: torch.Size | None = None
