"""The gated norm behind the delta rule: ours, Inductor's, the stock module, FLA's fused one."""

# T tokens, G value heads, V value dim

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, compiled, imported, normal, ours
from deltatune.bench.shapes import Shape

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = ("triton", "reference")
_EPS = 1e-6


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """x and gate ``[1, T, G, V]``, the weight frozen in what is timed."""
    G, V = shape.values["linear_num_value_heads"], shape.values["linear_value_head_dim"]
    weight = normal(setting.generator(0), V, dtype=setting.dtype, scale=0.1) + 1
    choose = functools.partial(_choose, setting)

    def draw(seed: int) -> dict[str, Tensor]:
        generator = setting.generator(seed)
        x, gate = (normal(generator, 1, tokens, G, V, dtype=setting.dtype) for _ in range(2))
        return {"x": x, "gate": gate, "weight": weight}

    stream = tokens * G * V * setting.dtype.itemsize
    return Case(
        op="gated_rms_norm",
        config=setting.config(shape, tokens, G=G, V=V),
        draw=draw,
        outputs=("y",),
        trained=("x", "gate"),
        checked=("weight",),
        reference=_call("reference"),
        variants=[
            *ours(IMPLEMENTATIONS, choose, _call),
            compiled(_call("reference")),
            Variant("stock eager", "stock", lambda: _stock(V)),
            Variant("FLA", "library", _fla),
        ],
        # reads x and gate, writes y; reads x, gate and dy, writes dx and dgate
        work=Work(3 * stream, 5 * stream, copy_bytes=stream),
        auto=choose("auto").impl,
    )


def _choose(setting: Setting, impl: str) -> ops.Choice:
    return ops.choose_gated_rms_norm(setting.device, setting.dtype, impl=impl)


def _call(impl: str) -> Function:
    return lambda t: ops.gated_rms_norm(t["x"], t["gate"], t["weight"], eps=_EPS, impl=impl)


def _stock(value_dim: int) -> Function:
    stock = imported("transformers.models.qwen3_5.modeling_qwen3_5", "Qwen3_5RMSNormGated")
    norm = stock(value_dim, eps=_EPS)
    return lambda t: torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"], t["gate"]))


def _fla() -> Function:
    rms_norm_gated = imported("fla.modules.norm.fused_norm_gate", "rms_norm_gated")

    def run(t: Tensors) -> Tensor:
        y: Tensor = rms_norm_gated(t["x"], t["gate"], t["weight"], None, activation="swish", eps=_EPS)
        return y

    return run
