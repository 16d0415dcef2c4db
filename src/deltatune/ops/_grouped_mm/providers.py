"""What multiplies groups of rows, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltatune.ops._grouped_mm import quack_grouped, torch_grouped
from deltatune.ops._nvidia import triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, otherwise, support

__all__ = ["GroupedMmSpec"]

#: Ends of groups that a program of the Triton kernels holds.
_MAX_GROUPS = 4096


def _torch(spec: GroupedMmSpec) -> Support:
    refusal = torch_grouped.refusal(spec.device, spec.dtype, spec.weight_shape)
    # its sums in fp32 are Triton's
    return support("F.grouped_mm runs on this device", refusal or triton_refusal(spec.device, spec.dtype))


def _triton(spec: GroupedMmSpec) -> Support:
    refusal = triton_refusal(spec.device, spec.dtype)
    if refusal is None and spec.weight_shape is not None and spec.weight_shape[0] > _MAX_GROUPS:
        refusal = f"its kernels take up to {_MAX_GROUPS} groups, got {spec.weight_shape[0]}; use impl='reference'"
    return support("a grouped product that waits for nothing", refusal)


def _quack(spec: GroupedMmSpec) -> Support:
    refusal = quack_grouped.refusal(spec.device, spec.dtype, spec.weight_shape)
    # rows of adapters, and sums in fp32, are Triton's
    return support("quack's product runs on this device", refusal or triton_refusal(spec.device, spec.dtype))


@dataclass(frozen=True)
class GroupedMmSpec(Spec):
    """What the choice for grouped products goes by; ``weight_shape`` is ``[G, N, K]``."""

    op = "grouped_mm"
    providers = (
        Provider("torch", _torch, "deltatune.ops._grouped_mm.torch_grouped"),
        Provider("triton", _triton, "deltatune.ops._grouped_mm.triton_grouped"),
        Provider("quack", _quack, "deltatune.ops._grouped_mm.quack_grouped"),
        Provider("reference", otherwise(_triton), "deltatune.ops._grouped_mm.reference"),
    )

    weight_shape: torch.Size | None = None
