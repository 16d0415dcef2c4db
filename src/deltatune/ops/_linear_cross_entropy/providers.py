"""What computes the head and its loss, and where it runs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltatune.ops._linear_cross_entropy import torch_chunked
from deltatune.ops._nvidia import constant, gpu_refusal, triton_refusal
from deltatune.ops._registry import Provider, Spec, Support, support

__all__ = ["LinearCrossEntropySpec"]

_ALIGNED = 8  # rows of 16-bit numbers that begin at multiples of 16 bytes


def _triton(spec: LinearCrossEntropySpec) -> Support:
    return support("an online softmax whose logits never reach memory", _triton_refusal(spec))


def _triton_refusal(spec: LinearCrossEntropySpec) -> str | None:
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bf16 and fp16, the inputs are {spec.dtype}; use impl='reference'"
    if spec.width is not None and spec.width % _ALIGNED:
        return f"its kernels need a width that is a multiple of {_ALIGNED}, got {spec.width}; use impl='reference'"
    refusal = triton_refusal(spec.device, spec.dtype)
    if refusal is not None:
        return refusal
    too_old = gpu_refusal("the kernel", spec.device, (9, 0))
    if too_old is not None:
        return f"{too_old}; use impl='reference'"
    return None if _has_descriptors() else "its kernels need triton >= 3.4; pip install -U triton"


@constant
def _has_descriptors() -> bool:
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def _torch(_: LinearCrossEntropySpec) -> Support:
    return support("torch's own chunked function", torch_chunked.missing())


def _reference(spec: LinearCrossEntropySpec) -> Support:
    rounds = "torch's own rounds the summed loss to the 16-bit dtype of its input"
    return Support(True, rounds if torch_chunked.rounds_loss(spec.dtype) else torch_chunked.missing() or "")


@dataclass(frozen=True)
class LinearCrossEntropySpec(Spec):
    """What the choice for ``linear_cross_entropy`` goes by; ``width`` is E."""

    op: ClassVar[str] = "linear_cross_entropy"
    providers: ClassVar[tuple[Provider, ...]] = (
        Provider("triton", _triton, "deltatune.ops._linear_cross_entropy.blocked"),
        Provider("torch", _torch, "deltatune.ops._linear_cross_entropy.torch_chunked"),
        Provider("reference", _reference, "deltatune.ops._linear_cross_entropy.reference"),
    )

    width: int | None = None

    def preferred(self) -> tuple[Provider, ...]:
        """torch's function comes last where it rounds the summed loss."""
        blocks, theirs, own = self.providers
        return (blocks, own, theirs) if torch_chunked.rounds_loss(self.dtype) else self.providers
