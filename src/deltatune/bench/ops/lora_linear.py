"""Adapters in a norm and a gated MLP, as a layer runs them: borders of several widths, products beside, PEFT's own.

All compiled, since elementwise work then writes into the border's tensor.
"""

# T tokens, E width of the residual stream, F width between, R rank

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, normal
from deltatune.bench.ops.gate import errors, results
from deltatune.bench.shapes import Shape
from deltatune.compile.graphs import fresh_code
from deltatune.lora.group import empty_operands, layout_of, take_in_all
from deltatune.lora.mode import BESIDE, FUSED
from deltatune.ops._lora_linear.api import linear_with_lora
from deltatune.ops._lora_linear.gated import gated_linear_with_lora
from deltatune.ops._lora_linear.gated_act import gated_act_runs
from deltatune.ops._lora_linear.layout import Layout, Operands
from deltatune.ops._lora_linear.low_rank import low_rank
from deltatune.ops._lora_linear.refresh import Refresh

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = (FUSED, BESIDE, "reference")
_SCALE: Final = 2.0
_EPS: Final = 1e-6
_SHARED: Final = ("gate", "up")
_ALONE: Final = ("down",)
_ADAPTERS: Final = tuple(f"{kind}_{name}" for name in (*_SHARED, *_ALONE) for kind in ("a", "b"))

#: What the projections of one input give, for their names.
_Project: TypeAlias = Callable[[Tensors, Tensor, Sequence[str]], Sequence[Tensor]]
#: What the last projection gives, from gate and up.
_Behind: TypeAlias = Callable[[Tensors, Tensor, Tensor], Tensor]
_Groups: TypeAlias = dict[str, tuple[Layout, Operands]]


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """``x + down(silu(gate(n)) * up(n))`` with ``n`` the normalised x ``[T, E]``; frozen weights, float32 adapters."""
    width, inner, rank = shape.values["hidden_size"], shape.values["intermediate_size"], setting.rank
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    generator = setting.generator(0)
    weights: dict[str, Tensor] = {}
    for name, (rows, columns) in shapes.items():
        weights[name] = normal(generator, rows, columns, dtype=setting.dtype, scale=columns**-0.5)
        weights[f"a_{name}"] = normal(generator, rank, columns, dtype=torch.float32, scale=columns**-0.5)
        weights[f"b_{name}"] = normal(generator, rows, rank, dtype=torch.float32, scale=0.1 * rank**-0.5)

    def draw(seed: int) -> dict[str, Tensor]:
        return {"x": normal(setting.generator(seed), tokens, width, dtype=setting.dtype), **weights}

    stream = tokens * width * setting.dtype.itemsize
    fused = functools.partial(_fused, weights)
    return Case(
        op="lora_linear",
        config=setting.config(shape, tokens, E=width, F=inner, R=rank, adapters="float32"),
        draw=draw,
        outputs=("y",),
        trained=("x", *_ADAPTERS),
        reference=functools.partial(_block, project=_peft),
        variants=[
            Variant(FUSED, "deltatune", fused),
            Variant("fused, activation by itself", "deltatune", functools.partial(fused, gated=False)),
            Variant("fused, borders in whole 16s", "deltatune", functools.partial(fused, padded_to=16)),
            Variant("fused, borders of 128", "deltatune", functools.partial(fused, padded_to=128)),
            Variant("fused, added to narrow products", "deltatune", functools.partial(fused, bordered=False)),
            Variant(BESIDE, "deltatune", lambda: _compiled(_beside)),
            Variant("PEFT's layers", "stock", lambda: _compiled(_peft)),
            Variant("reference", "stock", lambda: functools.partial(_block, project=_peft)),
            Variant("no adapters", "stock", lambda: _compiled(_base)),
        ],
        # reads x, writes y; reads x and dy, writes dx
        work=Work(2 * stream, 3 * stream, copy_bytes=stream, gemm=(tokens, width, inner)),
        auto=FUSED,
        budget=_budget,
    )


def _block(t: Tensors, project: _Project, behind: _Behind | None = None) -> Tensor:
    x = t["x"]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)).to(x.dtype)
    gate, up = project(t, normed, _SHARED)
    y = project(t, F.silu(gate) * up, _ALONE)[0] if behind is None else behind(t, gate, up)
    return x + y


def _base(t: Tensors, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Without adapters, which get zeros."""
    return [_ignoring(F.linear(x, t[name]), t[f"a_{name}"], t[f"b_{name}"]) for name in names]


class _Ignoring(torch.autograd.Function):
    """``y``; the others get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a, b = ctx.saved_tensors
        return grad, torch.zeros_like(a), torch.zeros_like(b)


def _peft(t: Tensors, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """In the dtype of the adapters, added in passes of their own."""
    found = []
    for name in names:
        a, b = t[f"a_{name}"], t[f"b_{name}"]
        y = F.linear(x, t[name])
        found.append((y + F.linear(F.linear(x.to(a.dtype), a), b) * _SCALE).to(y.dtype))
    return found


def _beside(t: Tensors, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    return [F.linear(x, t[name]) + low_rank(x, t[f"a_{name}"], t[f"b_{name}"], _SCALE) for name in names]


def _fused(weights: Tensors, *, padded_to: int | None = None, bordered: bool = True, gated: bool = True) -> Function:
    """The layers' own products; operands are made once, since all draws share weights and adapters.

    ``gated``: the activation's kernel where it runs; otherwise elementwise work around the products.
    """
    groups: _Groups = {}
    for names in (_SHARED, _ALONE):
        more = {} if padded_to is None else {"padded_to": padded_to}
        shapes = [(weights[name].shape[0], weights[name].shape[1]) for name in names]
        ranks = [[weights[f"a_{name}"].shape[0]] for name in names]
        shared = names == _SHARED
        layout = layout_of(shapes, ranks, gated_input=not shared, pointwise_gradients=shared, **more)
        if not bordered:
            layout = layout._replace(forward_border=False, backward_border=False)
        buffers = take_in_all(layout, [nn.Parameter(weights[name].clone(), requires_grad=False) for name in names])
        operands = empty_operands(layout, buffers)
        down, up = ([weights[f"{kind}_{name}"] for name in names] for kind in ("a", "b"))
        Refresh(layout, operands).run(down, up, [_SCALE] * len(names))
        groups[names[0]] = layout, operands

    def project(t: Tensors, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        layout, operands = groups[names[0]]
        down, up = ([t[f"{kind}_{name}"] for name in names] for kind in ("a", "b"))
        return linear_with_lora(x, operands, layout, down, up, numbers=tuple(range(len(names))))

    def behind(t: Tensors, gate: Tensor, up: Tensor) -> Tensor:
        layout, operands = groups["down"]
        adapters = [t["a_down"]], [t["b_down"]]
        return gated_linear_with_lora(gate, up, operands, layout, adapters)

    layout, operands = groups["down"]
    runs = layout.forward_border and gated_act_runs(operands.down.device, operands.down.dtype)
    return _compiled(project, behind if gated and runs else None)


def _compiled(project: _Project, behind: _Behind | None = None) -> Function:
    """The block with these projections, as code of its own: the compiler counts graphs by code."""

    def block(t: Tensors) -> Tensor:
        return _block(t, project, behind)

    compiled: Function = torch.compile(fresh_code(block, "block"), fullgraph=True, dynamic=False)
    return compiled


def _budget(inputs: Tensors, exact: Tensors) -> dict[str, float]:
    """The reference's error with adapters in the dtype of the weights: layers compute products of 16 bits."""
    rounded = {name: x.to(inputs["x"].dtype) for name, x in inputs.items()}
    wanted = ("x", *_ADAPTERS)
    return errors(results(functools.partial(_block, project=_peft), rounded, ("y",), wanted), exact)


_ignoring: Callable[[Tensor, Tensor, Tensor], Tensor] = _Ignoring.apply
