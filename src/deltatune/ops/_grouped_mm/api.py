"""Linear layers of groups of rows: documentation, validation and choice."""

# R rows, G groups, K input width, N output width, r rank of an adapter

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.ops._grouped_mm.linear import Copies, apply_grouped_linear
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._lora_linear.api import Adapter
from deltatune.ops._numerics import autocast
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, *, adapters: Sequence[Adapter] = (), impl: str = "auto"
) -> Tensor:
    """``y_r = W_g x_r + sum_j s_j B_jg (A_jg x_r)`` for every row r, g being the group the row belongs to.

    Args:
        x: ``[R, K]``, the rows of group 0 first, then those of group 1, and so on.
        weight: ``W [G, N, K]``, one matrix a group, oriented as in ``torch.nn.functional.linear``; any strides.
        offsets: int32 ``[G]``, where each group ends: group g holds rows ``offsets[g - 1]`` to ``offsets[g]``, none
            where they are equal. Rows past the last one are absent: zero out, and zero gradient, whatever they hold.
        adapters: ``A [G, r, K]``, ``B [G, N, r]`` and a scale each; in any floating dtype, cast to that of ``x`` for
            the products.
        impl: ``"torch"``: ``torch.nn.functional.grouped_mm``, bf16 on Hopper and datacenter Blackwell, widths multiples
            of 8. ``"triton"``: bf16, fp16 and fp32 on NVIDIA GPUs; nothing waits for ``offsets``. ``"quack"``:
            quack-kernels, bf16 and fp16 on compute capability 9.0, widths multiples of 8; with adapters as
            ``"triton"``. ``"reference"``: anywhere; on a CPU a row's result and gradient do not depend on the other
            rows or on its place among them by a single bit, on a GPU it waits for ``offsets``. ``"auto"``: the first
            that can run.

    Returns:
        ``[R, N]`` in the dtype of ``x``. Sums are fp32 inside a product (fp64 for fp64); ``A x`` and ``B^T dy`` are
        rounded to the dtype of ``x``; gradients of A and B are fp32 sums cast to the dtypes of A and B.

    Under autocast ``x`` and ``weight`` are cast to its dtype first. Gradients are those of first order; a frozen weight
    costs none, and without trained adapters ``x`` is then not kept for backward.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an ``impl`` that cannot run here;
            decreasing offsets, or such that end past R, with the reference (on a GPU a check would wait for them).
    """
    return checked_grouped_linear("grouped_linear", x, weight, offsets, adapters, impl)


def checked_grouped_linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    adapters: Sequence[Adapter],
    impl: str,
    copies: Copies | None = None,
) -> Tensor:
    """``grouped_linear`` for the public ``op``, of rows that may be copies of tokens."""
    x, weight = autocast(x, weight)
    sizes = bind_shapes(op, x=(x, "R K"), weight=(weight, "G N K"), offsets=(offsets, "G"))
    check_floating(op, x=x)
    check_same_device(op, x=x, weight=weight, offsets=offsets)
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: x and weight must share a dtype, got {x.dtype} and {weight.dtype}; cast one of them")
    if offsets.dtype != torch.int32:
        raise ValueError(f"{op}: offsets must be int32, got {offsets.dtype}")
    for down, up, _ in adapters:
        rank = down.shape[1] if down.ndim > 1 else -1
        if down.shape != (sizes["G"], rank, sizes["K"]) or up.shape != (sizes["G"], sizes["N"], rank):
            raise ValueError(
                f"{op}: expected adapters A [G, r, K] and B [G, N, r] for weight {list(weight.shape)}, "
                f"got A {list(down.shape)} and B {list(up.shape)}"
            )
    chosen = choose(GroupedMmSpec(x.device, x.dtype, weight.shape), impl).impl
    return apply_grouped_linear(x, weight, offsets, adapters, chosen, copies)
