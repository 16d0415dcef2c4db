"""Causal attention inside documents: ours, torch's varlen attention alone, masked SDPA, FlexAttention."""

# T tokens, N query heads, M key heads, D head dim

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, imported, normal, ours
from deltatune.bench.shapes import Shape
from deltatune.packing.sequences import Sequences

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = ("torch", "reference")
_GEMM = (8192, 8192, 8192)


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """q ``[1, T, N, D]``, k and v ``[1, T, M, D]``."""
    N, M, D = (shape.values[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    sequences = setting.sequences(tokens)
    choose = functools.partial(_choose, setting, D)

    def draw(seed: int) -> dict[str, Tensor]:
        generator = setting.generator(seed)
        return {
            name: normal(generator, 1, tokens, heads, D, dtype=setting.dtype)
            for name, heads in (("q", N), ("k", M), ("v", M))
        }

    queries, keys = (tokens * heads * D * setting.dtype.itemsize for heads in (N, M))
    return Case(
        op="varlen_attention",
        config=setting.config(shape, tokens, N=N, M=M, D=D),
        draw=draw,
        outputs=("o",),
        trained=("q", "k", "v"),
        reference=_call("reference", sequences),
        variants=[
            *ours(IMPLEMENTATIONS, choose, lambda impl: _call(impl, sequences)),
            Variant("torch varlen_attn", "library", lambda: _varlen_attn(sequences)),
            Variant("stock eager SDPA, T x T mask", "stock", lambda: _sdpa(sequences)),
            Variant("FlexAttention, compiled", "library", lambda: _flex(sequences)),
            Variant("flash-attn", "library", lambda: _flash_attn(sequences)),
        ],
        # reads q, k, v, writes o; reads q, k, v, o, do, writes dq, dk, dv
        work=Work(
            2 * queries + 2 * keys,
            4 * queries + 4 * keys,
            copy_bytes=queries,
            gemm=_GEMM if setting.device.type == "cuda" else (64, 64, 64),
        ),
        auto=choose("auto").impl,
    )


def _choose(setting: Setting, head_dim: int, impl: str) -> ops.Choice:
    return ops.choose_varlen_attention(setting.device, setting.dtype, head_dim=head_dim, impl=impl)


def _call(impl: str, sequences: Sequences) -> Function:
    return lambda t: ops.varlen_attention(t["q"], t["k"], t["v"], sequences=sequences, impl=impl)


def _bounds(sequences: Sequences) -> tuple[Tensor, int]:
    return sequences.cu_seqlens[: sequences.num_sequences + 1].clone(), sequences.max_length


def _varlen_attn(sequences: Sequences) -> Function:
    varlen_attn = imported("torch.nn.attention.varlen", "varlen_attn")
    bounds, longest = _bounds(sequences)
    if bounds.device.type != "cuda":
        raise ValueError("torch's varlen attention needs a GPU")
    # torch 2.13 wants to be told of fewer key heads
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run(t: Tensors) -> Tensor:
        q, k, v = (t[name][0] for name in "qkv")
        o: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **grouped)
        return o[None]

    return run


def _documents(sequences: Sequences) -> Tensor:
    """``[T]``, the number of each token's document."""
    return torch.cumsum(sequences.positions == 0, dim=0)


def _sdpa(sequences: Sequences) -> Function:
    document = _documents(sequences)
    mask = (document[:, None] == document[None, :]).tril_()

    def run(t: Tensors) -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def _flex(sequences: Sequences) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = _documents(sequences)
    if document.device.type != "cuda":
        raise ValueError("FlexAttention has no backward without a GPU")

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    tokens = document.numel()
    mask = create_block_mask(visible, None, None, tokens, tokens, device=str(document.device))
    attend = torch.compile(flex_attention, dynamic=False)

    def run(t: Tensors) -> Tensor:
        q, k, v = (t[name].transpose(1, 2) for name in "qkv")
        o: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=True)
        return o.transpose(1, 2)

    return run


def _flash_attn(sequences: Sequences) -> Function:
    flash_attn_varlen_func = imported("flash_attn", "flash_attn_varlen_func")

    bounds, longest = _bounds(sequences)

    def run(t: Tensors) -> Tensor:
        q, k, v = (t[name][0] for name in "qkv")
        o: Tensor = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)
        return o[None]

    return run
