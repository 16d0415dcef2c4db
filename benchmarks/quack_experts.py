"""The routed experts of a layer on quack's products, frozen and with adapters on all experts: a baseline.

Quack's products gather their rows, and gate what they computed before it is stored. Everything else here, the routing
and the sums of a token's rows, is plain torch, compiled.

With a row's token t, weight w, ``B'`` the scaled B of an adapter and ``d`` for gradients::

    a = W1 x_t + B1' A1 x_t    h = gate(a)    y_t = sum over its rows of w (W2 h + B2' A2 h)

Gate and up of a are interleaved columns in quack's hands, though our weights store one after the other.
"""

# T tokens, k experts of a token, R = T * k rows, X experts, H hidden width, I width of an expert, r rank of an expert

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops._grouped_mm.routing import route

__all__ = ["adapted", "frozen"]

#: The weight's outer dim holds all gates, then all ups; the product reads them by turns.
_HALVES: Final = ("B",)


class _Rows(NamedTuple):
    """A batch's rows, sorted by expert."""

    source: Tensor  # [R] int32, the token of each row
    slots: Tensor  # [R] int64, which of the T * k weights is each row's
    places: Tensor  # [T, k] int64, where a token's rows are
    ends: Tensor  # [X + 1] int32, 0 and where each expert's rows end


class _Tools(NamedTuple):
    """Quack's products, and what torch compiles between them."""

    quack: Any
    rows: Callable[[Tensor, int], _Rows]
    weighted: Callable[[Tensor, Tensor, Tensor], Tensor]
    summed: Callable[[Tensor, Tensor], Tensor]
    shares: Callable[[Tensor, Tensor], Tensor]
    ungated: Callable[..., tuple[Tensor, ...]]
    dots: Callable[[Tensor, Tensor, Tensor], Tensor]


def frozen() -> Callable[..., Tensor]:
    """``(x, index, weights, up, down) -> y``, for ``up [X, 2I, H]``, ``down [X, H, I]``; x and weights may train."""
    tools = _load()

    def run(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y: Tensor = _frozen(tools, tools.rows(index, len(up)), torch.is_grad_enabled(), x, weights, up, down)
        return y

    return run


def adapted(scale: float) -> Callable[..., Tensor]:
    """The same, then ``A [X, r, K]`` and ``B [X, N, r]`` of up and of down in fp32, any strides; all of them train."""
    tools = _load()

    def run(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, *factors: Tensor) -> Tensor:
        rows = tools.rows(index, len(up))
        y: Tensor = _adapted(tools, rows, torch.is_grad_enabled(), scale, x, weights, up, down, *factors)
        return y

    return run


def _load() -> _Tools:
    glue = (_rows, _weighted, _summed, _shares, _ungated, _dots)
    compiled: list[Any] = [torch.compile(function, dynamic=False) for function in glue]
    return _Tools(importlib.import_module("quack.gemm_interface"), *compiled)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tools: _Tools, rows: _Rows, keeps: bool, x: Tensor, weights: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        quack, ends = tools.quack, rows.ends
        inner, h = quack.gemm_gated(
            x, up.mT, activation="swiglu", cu_seqlens_m=ends, A_idx=rows.source, store_preact=keeps,
            concat_layout=_HALVES,
        )  # fmt: skip
        ctx.tools = tools
        ctx.save_for_backward(*rows, weights, up, down, inner)
        return tools.weighted(quack.gemm(h, down.mT, cu_seqlens_m=ends), rows.places, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, slots, places, ends, weights, up, down, inner = ctx.saved_tensors
        tools, weights_train = ctx.tools, ctx.needs_input_grad[4]
        # da = gate'(a, w W2^T dy_t)    dw = h W2^T dy_t
        dinner, _, *dshares = tools.quack.gemm_dgated(
            dy.contiguous(), down, inner, activation="swiglu", colvec_scale=tools.shares(weights, slots),
            colvec_reduce=weights_train, cu_seqlens_m=ends, A_idx=source, dynamic_scheduler=False,
        )  # fmt: skip
        drows = tools.quack.gemm(dinner, up, cu_seqlens_m=ends, concat_layout=_HALVES)
        dweights = dshares[0][places].to(weights.dtype) if weights_train else None
        return None, None, None, tools.summed(drows, places), dweights, None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tools: _Tools,
        rows: _Rows,
        keeps: bool,
        scale: float,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        quack, source = tools.quack, rows.source
        product, add = (functools.partial(call, cu_seqlens_m=rows.ends) for call in (quack.gemm, quack.gemm_add))
        a1, a2 = (_cast(a, 1.0, x.dtype) for a in factors[::2])
        b1, b2 = (_cast(b, scale, x.dtype) for b in factors[1::2])
        u1 = product(x, a1.mT, A_idx=source)
        inner, h = quack.gemm_gated(
            x, up.mT, product(u1, b1.mT, concat_layout=_HALVES), activation="swiglu", cu_seqlens_m=rows.ends,
            A_idx=source, store_preact=keeps, concat_layout=_HALVES,
        )  # fmt: skip
        u2 = product(h, a2.mT)
        outer = add(h, down.mT, product(u2, b2.mT))
        ctx.tools, ctx.scale = tools, scale
        ctx.save_for_backward(*rows, x, weights, up, down, a1, b1, a2, b2, u1, inner, h, u2)
        return tools.weighted(outer, rows.places, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, slots, places, ends, x, weights, up, down, a1, b1, a2, b2, u1, inner, h, u2 = ctx.saved_tensors
        tools, quack, dy = ctx.tools, ctx.tools.quack, dy.contiguous()
        product, add = (functools.partial(call, cu_seqlens_m=ends) for call in (quack.gemm, quack.gemm_add))
        sums = functools.partial(quack.gemm, cu_seqlens_k=ends, out_dtype=torch.float32)
        # the adapter's part of dh has no place in the epilogue of the gate's derivative, which reads a
        t2 = product(dy, b2, A_idx=source)
        dh = add(dy, down, product(t2, a2), A_idx=source)
        dinner, u1, u2, t2 = tools.ungated(inner, dh, tools.shares(weights, slots), u1, u2, t2, ctx.scale)
        t1 = product(dinner, b1)
        drows = add(dinner, up, product(t1, a1))
        # gathered rows stand on the left alone, so this one comes transposed
        da1 = torch.empty(*a1.shape, dtype=torch.float32, device=x.device)
        quack.gemm(x.mT, t1, out=da1.mT, cu_seqlens_k=ends, A_idx=source)
        dfactors = da1, sums(dinner.mT, u1), sums(t2.mT, h), sums(dy.mT, u2, A_idx=source)
        dweights = tools.dots(h, dh, places).to(weights.dtype) if ctx.needs_input_grad[5] else None
        return None, None, None, None, tools.summed(drows, places), dweights, None, None, *dfactors


_frozen: Callable[..., Any] = _Frozen.apply
_adapted: Callable[..., Any] = _Adapted.apply


def _cast(factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scaled and dense, whatever the order in which PEFT stores it."""
    return torch.mul(factor, scale, out=torch.empty(*factor.shape, dtype=dtype, device=factor.device))


def _rows(index: Tensor, experts: int) -> _Rows:
    routing = route(index, experts)
    source, places = routing.copies(index.shape[1])
    return _Rows(source.int(), routing.order, places, F.pad(routing.offsets, (1, 0)))


def _weighted(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """``[T, H]``, each token's rows by their weights."""
    return (rows[places] * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    return rows[places].sum(1)


def _shares(weights: Tensor, slots: Tensor) -> Tensor:
    """``[R]``, the weight of each row."""
    return weights.flatten()[slots]


def _ungated(
    inner: Tensor, dh: Tensor, share: Tensor, u1: Tensor, u2: Tensor, t2: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``da`` as the weight stores its rows, and the narrow sides of the factors' gradients: u1 s, u2 w s, t2 w."""
    share = share.unsqueeze(1)
    d = dh * share
    gate, up = inner[:, ::2].to(d.dtype), inner[:, 1::2].to(d.dtype)
    half = torch.sigmoid(gate)
    dgate, dup = d * up * half * (1 + gate * (1 - half)), d * gate * half
    dinner = torch.cat([dgate.to(inner.dtype), dup.to(inner.dtype)], 1)
    return dinner, u1 * scale, (u2 * (share * scale)).to(u2.dtype), (t2 * share).to(t2.dtype)


def _dots(h: Tensor, dh: Tensor, places: Tensor) -> Tensor:
    """``[T, k]``, the gradient of each row's weight."""
    return (h.to(torch.promote_types(h.dtype, torch.float32)) * dh).sum(1)[places]
