"""Norm and rotary embedding of the q and k heads: ours, Inductor's, the stock modules, Liger's norm with eager RoPE."""

# T tokens, N query heads, M key heads, D head dim, R rotary dims

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


def _stock(shape: Shape) -> Function:
    """transformers' own norm and rotation; heads before tokens, as its attention has them."""
    family, name = ("qwen3_5", "Qwen3_5RMSNorm") if shape.hybrid else ("qwen3", "Qwen3RMSNorm")
    modeling = f"transformers.models.{family}.modeling_{family}"
    apply_rotary_pos_emb = imported(modeling, "apply_rotary_pos_emb")
    norm = imported(modeling, name)(shape.values["head_dim"], eps=_EPS)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return y.transpose(1, 2)

    def run(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k = normed(t["q"], t["q_weight"]), normed(t["k"], t["k_weight"])
        q, k = apply_rotary_pos_emb(q, k, t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return run


def _liger(*, offset: bool) -> Function:
    rms_norm = imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
    apply_rotary_pos_emb = imported("transformers.models.qwen3_5.modeling_qwen3_5", "apply_rotary_pos_emb")

    # Qwen3.5 scales in fp32 by 1 + weight, which Liger calls gemma; Qwen3 rounds first, which it calls llama
    options = (_EPS, 1.0, "gemma", False) if offset else (_EPS, 0.0, "llama", False)

    def run(t: Tensors) -> tuple[Tensor, Tensor]:
        q, k = (rms_norm(t[name], t[f"{name}_weight"], *options).transpose(1, 2) for name in "qk")
        q, k = apply_rotary_pos_emb(q, k, t["cos"], t["sin"])
        return q.transpose(1, 2), k.transpose(1, 2)

    return run
