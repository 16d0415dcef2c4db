"""The experts of a mixture as two grouped linear layers, traceable and independent token by token."""

# T tokens, k experts of a token, R rows (T * k, or max_rows and one), X experts, H hidden width, I width of an expert,
# F before its gate

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._grouped_mm.api import checked_grouped_linear
from deltatune.ops._grouped_mm.op import grouped_gram
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._grouped_mm.routing import Routing, combine, permute, route
from deltatune.ops._lora_linear.api import Adapter
from deltatune.ops._numerics import autocast
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes

__all__ = ["ExpertLinear", "moe_experts"]


class ExpertLinear(NamedTuple):
    """``W [X, N, K]`` of any strides, a bias ``[X, N]`` or None, adapters ``A [X, r, K]``, ``B [X, N, r]``, scale."""

    weight: Tensor
    bias: Tensor | None = None
    adapters: Sequence[Adapter] = ()


def moe_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    gate: Callable[[Tensor], Tensor],
    *,
    max_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """``sum_j w_j * down_e(gate(up_e(x)))`` over the k experts ``e = top_k_index_j`` of a token, ``w_j`` its weights.

    The weight multiplies what enters ``down``, which is the same sum. The k results of a token are gathered and summed
    in the order of ``top_k_index``, never added into a shared place in the order in which rows arrive.

    Args:
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` integers; outside ``[0, X)`` a slot is absent and contributes exactly zero, to the
            output and to every gradient.
        top_k_weights: ``[T, k]``; in absent slots they may be anything.
        up: from H to F.
        down: from I to H.
        gate: ``[R, F] -> [R, I]``, row by row, such as ``silu(first half) * second half``.
        max_rows: how many slots are not absent at most, where that is known to be fewer than ``T * k``: memory is for
            so many. What is routed beyond is absent, in silence: the caller counts.
        impl: of ``grouped_linear``. With ``"reference"`` on a CPU a token's result and gradient do not depend on the
            other tokens, or on where those are routed, by a single bit.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an ``impl`` that cannot run here.
    """
    op = "moe_experts"
    sizes = bind_shapes(
        op,
        hidden=(hidden, "T H"),
        top_k_index=(top_k_index, "T k"),
        top_k_weights=(top_k_weights, "T k"),
        up=(up.weight, "X F H"),
        down=(down.weight, "X H I"),
    )
    (cast,) = autocast(hidden)  # as the products see it
    impls = [choose(GroupedMmSpec(cast.device, cast.dtype, layer.weight.shape), impl).impl for layer in (up, down)]
    rows = route(top_k_index, sizes["X"], max_rows)
    copies = rows.copies(sizes["k"])
    # a select: zero times what is not finite is not zero
    present = rows.place.view_as(top_k_index) < rows.offsets[-1]
    top_k_weights = torch.where(present, top_k_weights, 0)

    inner = checked_grouped_linear(op, hidden, up.weight, rows.offsets, up.adapters, impl, copies)
    if up.bias is not None:
        inner = inner + _bias_of_rows(up.bias, rows, inner.dtype, impls[0])
    # Vectorised CPU loops may round an element differently at their ends, so there it must not move with the routing.
    fixed_place = "reference" in impls
    weights = top_k_weights.reshape(-1, 1)
    if fixed_place:
        inner = permute(inner, rows.place, rows.order)
    else:
        weights = permute(weights, rows.order, rows.place)
    inner = gate(inner)
    if inner.shape[1:] != (sizes["I"],):
        raise ValueError(
            f"{op}: expected gate to make rows of {sizes['I']}, the width of down {list(down.weight.shape)}, from rows "
            f"of {sizes['F']}, got {list(inner.shape)}"
        )
    inner = (inner * weights).to(cast.dtype)
    if fixed_place:
        inner = permute(inner, rows.order, rows.place)
    outputs = checked_grouped_linear(op, inner, down.weight, rows.offsets, down.adapters, impl)
    if down.bias is not None and fixed_place:
        weights = permute(weights, rows.order, rows.place)
        outputs = outputs + (_bias_of_rows(down.bias, rows, outputs.dtype, impls[1]) * weights).to(outputs.dtype)
    y = combine(outputs, copies)
    if down.bias is not None and not fixed_place:
        # the same sum as one small product: no row of R is as wide as H for it, here or in backward
        each = torch.arange(sizes["X"], device=top_k_index.device)
        chosen = top_k_index.unsqueeze(-1) == each
        shares = torch.where(chosen, top_k_weights.unsqueeze(-1), 0).sum(1)
        y = y + shares.to(y.dtype) @ down.bias.to(y.dtype)
    return y.to(hidden.dtype)


def _bias_of_rows(bias: Tensor, rows: Routing, dtype: torch.dtype, impl: str) -> Tensor:
    """Each row's expert's ``[R, N]``; zero for absent rows."""
    return _bias_rows(bias.to(dtype), rows.experts, rows.offsets, impl)


class _BiasOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, experts: Tensor, offsets: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.impl = impl
        return torch.cat([bias, bias.new_zeros(1, bias.shape[1])])[experts]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        # sums over the rows of an expert are products with ones, as wide as a grouped product must be
        ones = dy.new_ones(dy.shape[0], 8)
        return grouped_gram(dy, ones, offsets, dy.dtype, ctx.impl)[:, :, 0], None, None, None


_bias_rows: Callable[..., Tensor] = _BiasOfRows.apply
