"""Norm and rotary embedding of the q and k heads: ours, Inductor's, the stock modules, Liger's norm with eager RoPE.

Once for q and k, and once as the final norm calls the op: one head as wide as the residual stream, nothing rotated.
"""

# T tokens, N query heads, M key heads, D head dim, R rotary dims, E width of the residual stream

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, compiled, imported, normal, ours
from deltatune.bench.shapes import Shape

__all__ = ["IMPLEMENTATIONS", "case", "final_norm"]

IMPLEMENTATIONS = ("triton", "reference")
_EPS = 1e-6


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """q ``[1, T, N, D]`` and k ``[1, T, M, D]``; hybrids have ``1 + weight`` and q as a view of a gated projection."""
    N, M, D = (shape.values[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    R = int(D * shape.values["rope_parameters"].get("partial_rotary_factor", 1.0))
    reference = _call("reference", offset=shape.hybrid)
    choose = functools.partial(_choose, setting)
    stream = tokens * (N + M) * D * setting.dtype.itemsize
    return Case(
        op="rms_norm_rope",
        config=setting.config(shape, tokens, N=N, M=M, D=D, R=R, unit_offset=shape.hybrid, gated=shape.hybrid),
        draw=lambda seed: _draw(setting, seed, tokens, (N, M, D, R), gated=shape.hybrid),
        outputs=("q_out", "k_out"),
        trained=("q", "k"),
        checked=("q_weight", "k_weight"),
        reference=reference,
        variants=[
            *ours(IMPLEMENTATIONS, choose, lambda impl: _call(impl, offset=shape.hybrid)),
            compiled(reference),
            Variant("stock eager", "stock", lambda: _stock(shape)),
            Variant("Liger norm, eager RoPE", "library", lambda: _liger(offset=shape.hybrid)),
        ],
        # reads q and k, writes both; reads them and their gradients, writes gradients; cos and sin are not counted
        work=Work(2 * stream, 3 * stream, copy_bytes=stream),
        auto=choose("auto").impl,
    )


def final_norm(shape: Shape, tokens: int, setting: Setting) -> Case:
    """x ``[1, T, E]``, the norm alone; hybrids have ``1 + weight``."""
    E, offset = shape.values["hidden_size"], shape.hybrid
    choose = functools.partial(_choose, setting)

    def draw(seed: int) -> dict[str, Tensor]:
        generator = setting.generator(seed)
        weight = normal(generator, E, dtype=setting.dtype, scale=0.1) + (0 if offset else 1)
        return {"x": normal(generator, 1, tokens, E, dtype=setting.dtype), "weight": weight}

    stream = tokens * E * setting.dtype.itemsize
    return Case(
        op="final_norm",
        config=setting.config(shape, tokens, E=E, unit_offset=offset),
        draw=draw,
        outputs=("y",),
        trained=("x",),
        checked=("weight",),
        reference=_norm_call("reference", offset=offset),
        variants=[
            *ours(IMPLEMENTATIONS, choose, lambda impl: _norm_call(impl, offset=offset)),
            compiled(_norm_call("reference", offset=offset)),
            Variant("stock eager", "stock", lambda: _stock_norm(shape, E)),
            Variant("Liger", "library", lambda: _liger_norm(offset=offset)),
        ],
        # reads x, writes y; reads x and dy, writes dx
        work=Work(2 * stream, 3 * stream, copy_bytes=stream),
        auto=choose("auto").impl,
    )


def _draw(
    setting: Setting, seed: int, tokens: int, sizes: tuple[int, int, int, int], *, gated: bool
) -> dict[str, Tensor]:
    (N, M, D, R), dtype = sizes, setting.dtype
    generator = setting.generator(seed)
    projected = normal(generator, 1, tokens, N, 2 * D if gated else D, dtype=dtype)
    angle = torch.rand(1, tokens, R // 2, generator=generator, device=setting.device) * 6.3
    angle = torch.cat([angle, angle], dim=-1)
    return {
        "q": projected[..., :D],
        "k": normal(generator, 1, tokens, M, D, dtype=dtype),
        "q_weight": normal(generator, D, dtype=dtype, scale=0.1) + (0 if gated else 1),
        "k_weight": normal(generator, D, dtype=dtype, scale=0.1) + (0 if gated else 1),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
    }


def _choose(setting: Setting, impl: str) -> ops.Choice:
    return ops.choose_rms_norm_rope(setting.device, setting.dtype, impl=impl)


def _call(impl: str, *, offset: bool) -> Function:
    def run(t: Tensors) -> tuple[Tensor, Tensor]:
        tensors = (t[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin"))
        return ops.rms_norm_rope_pair(*tensors, eps=_EPS, unit_offset=offset, impl=impl)[:2]

    return run


def _norm_call(impl: str, *, offset: bool) -> Function:
    def run(t: Tensors) -> Tensor:
        x = t["x"]
        angles = x.new_empty(1, x.shape[1], 0)
        return ops.rms_norm_rope(
            x.unsqueeze(2), t["weight"], angles, angles, eps=_EPS, unit_offset=offset, impl=impl
        ).squeeze(2)

    return run


def _stock(shape: Shape) -> Function:
    """transformers' own norm and rotation; heads before tokens, as its attention has them."""
    apply_rotary_pos_emb = imported(_stock_names(shape)[0], "apply_rotary_pos_emb")
    norm = _stock_norm(shape, shape.values["head_dim"])

    def run(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k = (norm({"x": t[name], "weight": t[f"{name}_weight"]}).transpose(1, 2) for name in "qk")
        q, k = apply_rotary_pos_emb(q, k, t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _stock_norm(shape: Shape, width: int) -> Callable[[Tensors], Tensor]:
    norm = imported(*_stock_names(shape))(width, eps=_EPS)

    def run(t: Tensors) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"],))
        return y

    return run


def _stock_names(shape: Shape) -> tuple[str, str]:
    """The module of transformers, and its norm."""
    family, norm = ("qwen3_5", "Qwen3_5RMSNorm") if shape.hybrid else ("qwen3", "Qwen3RMSNorm")
    return f"transformers.models.{family}.modeling_{family}", norm


def _liger(*, offset: bool) -> Function:
    norm = _liger_norm(offset=offset)
    apply_rotary_pos_emb = imported("transformers.models.qwen3_5.modeling_qwen3_5", "apply_rotary_pos_emb")

    def run(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k = (norm({"x": t[name], "weight": t[f"{name}_weight"]}).transpose(1, 2) for name in "qk")
        q, k = apply_rotary_pos_emb(q, k, t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _liger_norm(*, offset: bool) -> Callable[[Tensors], Tensor]:
    rms_norm = imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
    # Qwen3.5 scales in fp32 by 1 + weight, which Liger calls gemma; Qwen3 rounds first, which it calls llama
    options = (_EPS, 1.0, "gemma", False) if offset else (_EPS, 0.0, "llama", False)

    def run(t: Tensors) -> Tensor:
        y: Tensor = rms_norm(t["x"], t["weight"], *options)
        return y

    return run
