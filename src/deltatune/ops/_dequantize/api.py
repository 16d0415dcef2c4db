"""The values of quantised matrices: documentation, validation and choice."""

# G experts, N rows, K columns

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._dequantize import op
from deltatune.ops._dequantize.providers import DequantizeSpec
from deltatune.ops._dequantize.weight import QuantizedWeight
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_same_device

__all__ = ["dequantize"]


def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype, *, offsets: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The values of frozen quantised matrices, by the formulas of ``QuantizedWeight``.

    Products are in fp32 and rounded once to ``dtype``. Every implementation gives the same bits; a NaN may be another.

    Args:
        weight: W ``[N, K]`` or ``[G, N, K]``, none of its tensors requiring a gradient.
        dtype: of the result, floating point.
        offsets: int32 ``[G]``, where each group of rows ends, as in ``grouped_linear``. The matrix of a group without
            rows need not be decoded and may hold anything. None decodes all. Nothing waits for their values.
        impl: ``"triton"``: one pass over memory on NVIDIA GPUs, to bf16, fp16 and fp32. ``"reference"``: plain torch,
            anywhere, to any dtype; matrices without rows are NaN. ``"auto"``: the first that can run.

    Returns:
        ``[..., N, K]``, contiguous. It has no gradient; in a graph it is one opaque op, which backward may call again.

    Raises:
        ValueError: tensors that do not fit the format or each other, one that requires a gradient, a ``dtype`` that is
            not floating point, or an ``impl`` that cannot run here.

    Source: QLoRA, arXiv 2305.14314 (nf4); OCP Microscaling Formats 1.0 (mxfp4); the layouts of bitsandbytes,
    DeepSeek-V3, gpt-oss, TensorRT Model Optimizer and compressed-tensors.
    """
    name = "dequantize"
    weight.check(name)
    tensors = {"codes": weight.codes, "scales": weight.scales}
    if weight.extra is not None:
        tensors["extra"] = weight.extra
    for what, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {what} requires a gradient, and there is none; call {what}.requires_grad_(False)"
            )
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: dtype must be floating point, got {dtype}")
    if offsets is not None:
        groups = list(weight.shape[:-2])
        if offsets.dtype != torch.int32 or list(offsets.shape) != groups or not groups:
            raise ValueError(
                f"{name}: expected offsets int32 [G] for a weight [G, N, K], "
                f"got {offsets.dtype} {list(offsets.shape)} for {list(weight.shape)}"
            )
        check_same_device(name, codes=weight.codes, offsets=offsets)
    chosen = choose(DequantizeSpec(weight.codes.device, dtype), impl).impl
    codes, scales = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in (weight.codes, weight.scales))
    return op.dequantize(codes, scales, weight.extra, offsets, weight.format, weight.divides, dtype, chosen)
