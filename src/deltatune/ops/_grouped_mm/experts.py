"""The experts of a mixture as two grouped matrix products, traceable and independent token by token."""

# T tokens, k experts a token goes to, R = T * k rows, X experts, H hidden width, I width of an expert

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from deltatune.ops._grouped_mm.api import grouped_mm
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._numerics import autocast
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes

__all__ = ["moe_experts"]


def moe_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    act: Callable[[Tensor], Tensor],
    *,
    impl: str = "auto",
) -> Tensor:
    """``sum_j top_k_weights_j * down_e (act(gate_e x) * up_e x)`` over the k experts ``e = top_k_index_j`` of a token.

    Shapes depend on T and k alone, whatever the routing. The k results of a token are gathered and summed in the order
    of ``top_k_index``, never added into a shared place in the order in which rows arrive.

    Args:
        hidden: ``[T, H]``.
        top_k_index: ``[T, k]`` integers in ``[0, X)``.
        top_k_weights: ``[T, k]``, cast to the dtype of ``hidden``.
        gate_up_proj: ``[X, 2 I, H]``, the gate's rows first.
        down_proj: ``[X, H, I]``.
        act: elementwise.
        impl: of ``grouped_mm``. With ``"reference"`` on a CPU a token's result and gradient do not depend on the other
            tokens, or on where those are routed, by a single bit.

    Returns:
        ``[T, H]`` in the dtype of ``hidden``.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an ``impl`` that cannot run here.
    """
    sizes = bind_shapes(
        "moe_experts",
        hidden=(hidden, "T H"),
        top_k_index=(top_k_index, "T k"),
        top_k_weights=(top_k_weights, "T k"),
        gate_up_proj=(gate_up_proj, "X 2I H"),
        down_proj=(down_proj, "X H I"),
    )
    if sizes["2I"] != 2 * sizes["I"]:
        raise ValueError(
            f"moe_experts: gate_up_proj {list(gate_up_proj.shape)} must hold twice the width of "
            f"down_proj {list(down_proj.shape)}"
        )
    (cast,) = autocast(hidden)  # as grouped_mm sees it
    impls = {choose(GroupedMmSpec(cast.device, cast.dtype, w.shape), impl).impl for w in (gate_up_proj, down_proj)}
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    ends = torch.arange(sizes["X"], device=order.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts[order], ends, right=True, out_int32=True)

    # each token k times in a row; backward sums them in a fixed order
    rows = hidden.unsqueeze(1).expand(-1, sizes["k"], -1).flatten(0, 1)
    gate_up = grouped_mm(_permute(rows, order, place), gate_up_proj, offsets, impl=impl)
    # Vectorised CPU loops may round an element differently at their ends, so there it must not move with the routing.
    fixed_place = "reference" in impls
    if fixed_place:
        gate_up = _permute(gate_up, place, order)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = act(gate) * up
    if fixed_place:
        inner = _permute(inner, order, place)
    outputs = _permute(grouped_mm(inner, down_proj, offsets, impl=impl), place, order)
    weighted = outputs.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1).to(outputs.dtype)
    return weighted.sum(1).to(hidden.dtype)


class _Permute(torch.autograd.Function):
    """``x[order]`` whose backward is a gather too, where torch's own adds rows into zeros with atomics."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy[inverse], None, None


_permute: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permute.apply
