"""The short convolution with SiLU: ours, Inductor's, the stock torch one (which knows no documents), FLA's, Dao's.

Once alone, and once as the layer calls it: in three parts, heads of q and k normalised.
"""

# T tokens, D channels, W taps, H key heads, K key dim, G value heads, V value dim

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, compiled, imported, normal, ours
from deltatune.bench.shapes import Shape
from deltatune.packing.sequences import Sequences

__all__ = ["IMPLEMENTATIONS", "case", "case_with_l2norm"]

IMPLEMENTATIONS = ("triton", "reference")
_L2_EPS = 1e-6


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """``[1, T, D]`` of a layer's projected q, k and v, the weight frozen in what is timed."""
    sequences = setting.sequences(tokens)
    return _case(
        shape,
        tokens,
        setting,
        outputs=("y",),
        reference=_call("reference", sequences),
        unpacked=_call("reference", None),
        variants=[
            *_ours(setting, lambda impl: _call(impl, sequences)),
            compiled(_call("reference", sequences)),
            Variant("stock eager, documents ignored", "stock", lambda: _stock, packed=False),
            Variant("FLA", "library", lambda: _fla(sequences)),
            Variant("causal-conv1d", "library", lambda: _causal_conv1d(sequences)),
        ],
    )


def case_with_l2norm(shape: Shape, tokens: int, setting: Setting) -> Case:
    """The same in three contiguous parts, each head of q and k scaled to length 1."""
    values, sequences = shape.values, setting.sequences(tokens)
    K = values["linear_key_head_dim"]
    keys = values["linear_num_key_heads"] * K
    split = (keys, keys, values["linear_num_value_heads"] * values["linear_value_head_dim"])
    parts = functools.partial(_parts, sequences, split, K)
    return _case(
        shape,
        tokens,
        setting,
        outputs=("q", "k", "v"),
        reference=parts("reference"),
        variants=[
            *_ours(setting, parts),
            compiled(parts("reference")),
            Variant("triton, l2norm by Inductor", "compile", lambda: _apart(setting, sequences, split, K)),
            Variant("FLA, and its l2norm", "library", lambda: _fla_parts(sequences, split, K)),
        ],
    )


def _case(
    shape: Shape,
    tokens: int,
    setting: Setting,
    *,
    outputs: tuple[str, ...],
    reference: Function,
    variants: list[Variant],
    unpacked: Function | None = None,
) -> Case:
    keys = shape.values["linear_num_key_heads"] * shape.values["linear_key_head_dim"]
    D = 2 * keys + shape.values["linear_num_value_heads"] * shape.values["linear_value_head_dim"]
    W = shape.values["linear_conv_kernel_dim"]
    weight = normal(setting.generator(0), D, W, dtype=setting.dtype, scale=W**-0.5)

    def draw(seed: int) -> dict[str, Tensor]:
        return {"x": normal(setting.generator(seed), 1, tokens, D, dtype=setting.dtype), "weight": weight}

    stream = tokens * D * setting.dtype.itemsize
    return Case(
        op="causal_conv",
        config=setting.config(shape, tokens, D=D, W=W, activation="silu", l2norm=len(outputs) > 1),
        draw=draw,
        outputs=outputs,
        trained=("x",),
        checked=("weight",),
        reference=reference,
        unpacked=unpacked,
        variants=variants,
        # reads x, writes y; reads x and dy, writes dx
        work=Work(2 * stream, 3 * stream, copy_bytes=stream),
        auto=_choose(setting, "auto").impl,
    )


def _ours(setting: Setting, function: Callable[[str], Function]) -> list[Variant]:
    return ours(IMPLEMENTATIONS, functools.partial(_choose, setting), function)


def _choose(setting: Setting, impl: str) -> ops.Choice:
    return ops.choose_causal_conv(setting.device, setting.dtype, impl=impl)


def _call(impl: str, sequences: Sequences | None) -> Function:
    def run(t: Tensors) -> Tensor:
        return ops.causal_conv(t["x"], t["weight"], activation="silu", sequences=sequences, impl=impl)

    return run


def _parts(sequences: Sequences, split: tuple[int, ...], head: int, impl: str) -> Function:
    def run(t: Tensors) -> tuple[Tensor, ...]:
        return ops.causal_conv(t["x"], t["weight"], sequences=sequences, split=split, l2norm=(head, head, 0), impl=impl)

    return run


def _apart(setting: Setting, sequences: Sequences, split: tuple[int, ...], head: int) -> Function:
    _choose(setting, "triton")

    def run(t: Tensors) -> tuple[Tensor, ...]:
        q, k, v = ops.causal_conv(t["x"], t["weight"], sequences=sequences, split=split, impl="triton")
        return _normalised(q, head), _normalised(k, head), v

    function: Function = torch.compile(run, fullgraph=True, dynamic=False)
    return function


def _normalised(x: Tensor, head: int) -> Tensor:
    heads = _heads(x, head).float()
    return (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _L2_EPS)).flatten(-2).to(x.dtype)


def _heads(x: Tensor, head: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, head)


def _stock(t: Tensors) -> Tensor:
    """The stock layers' torch path: ``[B, D, T]``, padded on both sides and cut."""
    x, weight = t["x"], t["weight"]
    channels = x.transpose(1, 2)
    y = F.conv1d(channels, weight.unsqueeze(1), padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(y[:, :, : x.shape[1]]).transpose(1, 2)


def _fla(sequences: Sequences) -> Function:
    causal_conv1d = imported("fla.modules.causal_conv1d", "causal_conv1d")

    count = sequences.num_sequences + 1
    bounds, bounds_cpu = sequences.cu_seqlens[:count].clone(), sequences.cu_seqlens_cpu[:count].clone()

    def run(t: Tensors) -> Tensor:
        y: Tensor = causal_conv1d(t["x"], t["weight"], activation="silu", cu_seqlens=bounds, cu_seqlens_cpu=bounds_cpu)[
            0
        ]
        return y

    return run


def _causal_conv1d(sequences: Sequences) -> Function:
    causal_conv1d_fn = imported("causal_conv1d", "causal_conv1d_fn")

    document = torch.cumsum(sequences.positions == 0, dim=0, dtype=torch.int32)[None] - 1

    def run(t: Tensors) -> Tensor:
        y: Tensor = causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], activation="silu", seq_idx=document)
        return y.transpose(1, 2)

    return run


def _fla_parts(sequences: Sequences, split: tuple[int, ...], head: int) -> Function:
    convolve, l2norm = _fla(sequences), imported("fla.modules.norm.l2norm", "l2norm")

    def run(t: Tensors) -> tuple[Tensor, ...]:
        y = convolve(t)
        assert isinstance(y, Tensor)
        q, k, v = torch.split(y, list(split), dim=-1)
        q, k = (l2norm(_heads(x, head), eps=_L2_EPS).flatten(-2) for x in (q, k))
        return q, k, v

    return run
