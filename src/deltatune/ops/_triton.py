"""Whether this package's own Triton kernels can run, found out without importing triton."""

from __future__ import annotations

import importlib.util

import torch

from deltatune.ops._nvidia import capability_of, constant, dotted, gpu_refusal

__all__ = ["triton_refusal"]

_OLDEST, _OLDEST_BF16 = (7, 0), (8, 0)


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel that takes bf16, fp16 and fp32 cannot run, with the remedy; None where it can."""
    refusal = gpu_refusal("triton", device, _OLDEST)
    if refusal is not None:
        return f"{refusal}; use impl='reference'"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes bf16, fp16 and fp32, got {dtype}; cast the inputs or use impl='reference'"
    if not _has_triton():
        return "triton is not installed; pip install triton or use impl='reference'"
    capability = capability_of(device)
    if capability is not None and capability < _OLDEST_BF16 and dtype == torch.bfloat16:
        return (
            f"bf16 kernels need compute capability {dotted(_OLDEST_BF16)} or newer, this GPU has {dotted(capability)}; "
            "cast to fp16 or use impl='reference'"
        )
    return None


@constant
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
