"""The gated normalisation behind the delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._choice import Choice, choose, traced_reference
from deltatune.ops._gated_rms_norm import reference
from deltatune.ops._validation import check_floating, check_same_device

__all__ = ["choose_gated_rms_norm", "gated_rms_norm"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, impl: str = "auto") -> Tensor:
    """``RMSNorm(x) * weight * silu(gate)`` over the last dimension.

    Rounding follows the stock module: the norm in fp32 (fp64 for fp64 input), rounded to ``x.dtype``; times
    ``weight`` in the dtype the two promote to; times ``silu(gate)`` computed in fp32; rounded to ``x.dtype``.

    Args:
        x: ``[..., D]``.
        gate: the shape of ``x``; its dtype may differ.
        weight: ``[D]``.
        eps: added to the mean square, inside the root.
        impl: ``"auto"`` or ``"reference"``.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot run.

    Source: ``Qwen3_5RMSNormGated`` of transformers; Gated Delta Networks, arXiv 2412.06464.
    """
    op = "gated_rms_norm"
    if x.ndim == 0 or gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: expected x [..., D], gate [..., D], weight [D]; "
            f"got x {list(x.shape)}, gate {list(gate.shape)}, weight {list(weight.shape)}"
        )
    check_floating(op, x=x, gate=gate, weight=weight)
    check_same_device(op, x=x, gate=gate, weight=weight)
    choose_gated_rms_norm(x.device, x.dtype, impl=impl)
    return reference.gated_rms_norm(x, gate, weight, eps)


def choose_gated_rms_norm(device: torch.device, dtype: torch.dtype, *, impl: str = "auto") -> Choice:
    """Which implementation of ``gated_rms_norm`` runs, and why."""
    return choose("gated_rms_norm", impl, [traced_reference(device, dtype)])
