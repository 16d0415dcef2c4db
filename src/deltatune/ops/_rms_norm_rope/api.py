"""The normalisation of query and key heads and their rotary embedding, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._choice import Choice, choose, traced_reference
from deltatune.ops._rms_norm_rope import reference
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device

__all__ = ["choose_rms_norm_rope", "rms_norm_rope"]


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    impl: str = "auto",
) -> Tensor:
    """``rope(RMSNorm(x) * weight)`` for each head.

    The first R dims rotate by halves: with ``a = y[:R/2]`` and ``b = y[R/2:R]`` they become ``a cos - b sin`` and
    ``b cos + a sin`` (cos and sin of the half they stand in); dims from R on pass.

    Rounding follows the stock modules. The norm runs in fp32 (fp64 for fp64 input). Then, without ``unit_offset``
    (Qwen3), it is rounded to ``x.dtype`` before it is multiplied by ``weight``; with it (Qwen3-Next, Qwen3.5) it is
    multiplied by ``1 + weight`` in fp32 and rounded after. The rotation runs in the dtype that this and cos and sin
    promote to, which is the dtype of the result.

    Args:
        x: ``[B, T, N, D]``, any strides.
        weight: ``[D]``, or None for a norm without scale.
        cos: ``[B or 1, T, R]``, R even and at most D.
        sin: the shape of ``cos``.
        eps: added to the mean square, inside the root.
        unit_offset: scale by ``1 + weight`` rather than ``weight``.
        impl: ``"auto"`` or ``"reference"``.

    Raises:
        ValueError: shapes that do not fit, an odd R or one above D, or an implementation that cannot run.

    Source: ``Qwen3RMSNorm``, ``Qwen3_5RMSNorm`` and ``apply_rotary_pos_emb`` of transformers.
    """
    _check(x, weight, cos, sin)
    choose_rms_norm_rope(x.device, x.dtype, impl=impl)
    return reference.rms_norm_rope(x, weight, cos, sin, eps, unit_offset)


def choose_rms_norm_rope(device: torch.device, dtype: torch.dtype, *, impl: str = "auto") -> Choice:
    """Which implementation of ``rms_norm_rope`` runs, and why."""
    return choose("rms_norm_rope", impl, [traced_reference(device, dtype)])


def _check(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    op = "rms_norm_rope"
    rows = "1" if cos.ndim == 3 and cos.shape[0] == 1 else "B"
    tensors = {"x": x, "cos": cos, "sin": sin} | ({} if weight is None else {"weight": weight})
    patterns = {"x": "B T N D", "cos": f"{rows} T R", "sin": f"{rows} T R", "weight": "D"}
    sizes = bind_shapes(op, **{name: (tensor, patterns[name]) for name, tensor in tensors.items()})
    if sizes["R"] % 2 or sizes["R"] > sizes["D"]:
        raise ValueError(
            f"{op}: the rotary size R of cos and sin must be even and at most D={sizes['D']}, got R={sizes['R']}"
        )
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
