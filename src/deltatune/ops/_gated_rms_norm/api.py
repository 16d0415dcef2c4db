"""The gated normalisation behind the delta rule."""

from __future__ import annotations

from torch import Tensor

from deltatune.ops._gated_rms_norm import op, reference
from deltatune.ops._gated_rms_norm.providers import GatedRmsNormSpec
from deltatune.ops._numerics import most_demanding
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_floating, check_same_device

__all__ = ["gated_rms_norm"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, impl: str = "auto") -> Tensor:
    """``RMSNorm(x) * weight * silu(gate)`` over the last dimension.

    Rounding follows the stock module: the norm in fp32 (fp64 for fp64 input), rounded to ``x.dtype``; times
    ``weight`` in the dtype the two promote to; times ``silu(gate)`` computed in fp32; rounded to ``x.dtype``.

    Args:
        x: ``[..., D]``.
        gate: the shape of ``x``; its dtype may differ.
        weight: ``[D]``.
        eps: added to the mean square, inside the root.
        impl: ``"triton"``: one kernel each way, on NVIDIA GPUs, for bf16, fp16 and fp32; strided views of heads are
            read where they lie. ``"reference"``: plain torch, anywhere. ``"auto"``: the first that can run.

    Returns:
        The shape and dtype of ``x``; contiguous from the kernel.

    The kernel keeps x, gate and weight for backward and nothing else. Its backward computes in fp32 without the
    roundings in between; gradients are those of first order; that of ``weight`` is computed where it is needed, in a
    fixed order, so that runs repeat bit for bit.

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot run.

    Source: ``Qwen3_5RMSNormGated`` of transformers; Gated Delta Networks, arXiv 2412.06464.
    """
    name = "gated_rms_norm"
    if x.ndim == 0 or gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: expected x [..., D], gate [..., D], weight [D]; "
            f"got x {list(x.shape)}, gate {list(gate.shape)}, weight {list(weight.shape)}"
        )
    check_floating(name, x=x, gate=gate, weight=weight)
    check_same_device(name, x=x, gate=gate, weight=weight)
    spec = GatedRmsNormSpec(x.device, most_demanding(x.dtype, gate.dtype, weight.dtype))
    if choose(spec, impl).impl == "triton":
        return op.gated_rms_norm(x, gate, weight, eps)
    return reference.gated_rms_norm(x, gate, weight, eps)
