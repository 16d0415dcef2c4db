"""Grouped matrix products: documentation, validation and choice."""

# R rows, G groups, K input width, N output width

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._grouped_mm import op as _op
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._numerics import autocast
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device

__all__ = ["grouped_mm"]


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, impl: str = "auto") -> Tensor:
    """``y_r = weight_g x_r`` for every row r, g being the group the row belongs to.

    Args:
        x: ``[R, K]``, the rows of group 0 first, then those of group 1, and so on.
        weight: ``[G, N, K]``, one matrix a group, oriented as in ``torch.nn.functional.linear``.
        offsets: int32 ``[G]``, where each group ends: group g holds rows ``offsets[g - 1]`` to ``offsets[g]``, none
            where they are equal. The last one is R: every row belongs to a group (the reference checks that; on a GPU
            checking would wait for it).
        impl: ``"torch"``: ``torch.nn.functional.grouped_mm``, bf16 on NVIDIA GPUs, widths multiples of 8.
            ``"reference"``: anywhere; on a CPU a row's result and gradient do not depend on the other rows or on its
            place among them by a single bit, on a GPU it waits for ``offsets``. ``"auto"``: the first that can run.

    Returns:
        ``[R, N]`` in the dtype of ``x``, accumulated in fp32 (fp64 for fp64).

    Under autocast ``x`` and ``weight`` are cast to its dtype first. Gradients are those of first order; a frozen weight
    costs none, and then ``x`` is not kept for backward.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an ``impl`` that cannot run here;
            offsets that do not end at R, with the reference.
    """
    op = "grouped_mm"
    x, weight = autocast(x, weight)
    bind_shapes(op, x=(x, "R K"), weight=(weight, "G N K"), offsets=(offsets, "G"))
    check_floating(op, x=x)
    check_same_device(op, x=x, weight=weight, offsets=offsets)
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: x and weight must share a dtype, got {x.dtype} and {weight.dtype}; cast one of them")
    if offsets.dtype != torch.int32:
        raise ValueError(f"{op}: offsets must be int32, got {offsets.dtype}")
    return _op.grouped_mm(x, weight, offsets, choose(GroupedMmSpec(x.device, x.dtype, weight.shape), impl).impl)
