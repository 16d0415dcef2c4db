"""The layer behind a gated activation, with an adapter: ours, where the activation's kernel computes ``h A^T`` too."""

# T tokens, E width of the residual stream, F width of the activation, R rank

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, compiled, normal
from deltatune.bench.ops.gate import errors, results
from deltatune.bench.shapes import Shape
from deltatune.compile.graphs import fresh_code
from deltatune.lora.group import empty_operands, layout_of, take_in_all
from deltatune.lora.mode import FUSED
from deltatune.ops._lora_linear.gated import gated_linear_with_lora
from deltatune.ops._lora_linear.refresh import Refresh

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = (FUSED, "reference")
_SCALE: Final = 2.0
_TRAINED: Final = ("gate", "up", "a", "b")


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """``h W^T + s (h A^T) B^T`` for ``h = silu(gate) up`` ``[T, F]``; W ``[E, F]`` frozen, A and B in float32."""
    values, rank = shape.values, setting.rank
    width = values["hidden_size"]
    inner = values.get("intermediate_size") or values["shared_expert_intermediate_size"]
    generator = setting.generator(0)
    weights = {
        "w": normal(generator, width, inner, dtype=setting.dtype, scale=inner**-0.5),
        "a": normal(generator, rank, inner, dtype=torch.float32, scale=inner**-0.5),
        "b": normal(generator, width, rank, dtype=torch.float32, scale=rank**-0.5),
    }

    def draw(seed: int) -> dict[str, Tensor]:
        of_draw = setting.generator(seed)
        both = {name: normal(of_draw, tokens, inner, dtype=setting.dtype) for name in ("gate", "up")}
        return both | weights

    h, y = (tokens * size * setting.dtype.itemsize for size in (inner, width))
    return Case(
        op="lora_gated",
        config=setting.config(shape, tokens, E=width, F=inner, R=rank, adapters="float32"),
        draw=draw,
        outputs=("y",),
        trained=_TRAINED,
        reference=_peft,
        variants=[
            Variant(FUSED, "deltatune", lambda: _fused(weights)),
            compiled(_peft),
            Variant("reference", "stock", lambda: _peft),
        ],
        # reads gate and up, writes y; reads both and dy, writes their gradients
        work=Work(2 * h + y, 4 * h + y, copy_bytes=h, gemm=(tokens, inner, width)),
        auto=FUSED,
        budget=_budget,
    )


def _fused(weights: Tensors) -> Function:
    """Compiled, as layers are; the operands are made once, since all draws share weight and adapter."""
    weight, a, b = (weights[name] for name in ("w", "a", "b"))
    layout = layout_of(
        [(weight.shape[0], weight.shape[1])], [[a.shape[0]]], gated_input=True, pointwise_gradients=False
    )
    operands = empty_operands(layout, take_in_all(layout, [nn.Parameter(weight.clone(), requires_grad=False)]))
    Refresh(layout, operands).run([a], [b], [_SCALE])

    def run(t: Tensors) -> Tensor:
        return gated_linear_with_lora(t["gate"], t["up"], operands, layout, ([t["a"]], [t["b"]]))

    function: Function = torch.compile(fresh_code(run, "gated"), fullgraph=True, dynamic=False)
    return function


def _peft(t: Tensors) -> Tensor:
    """In the dtype of the adapters."""
    h, a, b = F.silu(t["gate"]) * t["up"], t["a"], t["b"]
    y = F.linear(h, t["w"])
    return (y + F.linear(F.linear(h.to(a.dtype), a), b) * _SCALE).to(y.dtype)


def _budget(inputs: Tensors, exact: Tensors) -> dict[str, float]:
    """The reference's error with the adapter in the dtype of the weight: layers compute products of 16 bits."""
    rounded = {name: tensor.to(inputs["gate"].dtype) for name, tensor in inputs.items()}
    return errors(results(_peft, rounded, ("y",), _TRAINED), exact)
