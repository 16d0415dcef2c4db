"""The ops at the shapes of models: inputs, everything that computes the op, and the least that must be moved.

Over the public names of ``deltatune.ops`` alone. A case is a function of a shape, a token count and a ``Run``; to add
one, write the function and name it in ``CASES``.
"""

# T tokens, E width of the residual stream, V vocabulary; H key heads, G value heads of dims K and V in the delta rule,
# C channels, W taps; N query heads, M key heads of dim D, R rotary dims in attention

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import decode_cases, gated_cases, moe_cases
from benchmarks.shapes import Shape
from benchmarks.systems import draw_lengths
from deltatune import Sequences, ops

__all__ = ["CASES", "Case", "Entry", "Function", "Run", "Tensors", "Variant"]

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Any]
"""Inputs by name -> the result, or a tuple of results."""

_EPS: Final = 1e-6
#: A state lives through hundreds of tokens: errors add up, and a leak between documents shows.
_SLOW_DECAY: Final = 0.05
_SQUARE: Final = (8192, 8192, 8192)
_PRODUCTS: Final = tuple(getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "baddbmm", "matmul"))


@dataclass(frozen=True)
class Run:
    """What all cases of a run share: device, dtype of activations and weights, and the seed of lengths."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def lengths(self, tokens: int) -> list[int]:
        """Of the documents, as in training steps."""
        return draw_lengths(tokens, shortest=min(64, tokens), seed=self.seed)

    def sequences(self, tokens: int) -> Sequences:
        """The documents."""
        return Sequences.from_lengths(self.lengths(tokens)).to(self.device)

    def draw(self, seed: int) -> Callable[..., Tensor]:
        """Normally distributed values: ``(*shape, dtype=..., scale=...)``."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, device=self.device)).to(dtype)

        return normal


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        by: ``"deltatune"``, ``"compile"`` (the reference under torch.compile), ``"stock"`` or ``"library"``.
        build: makes the function; an ImportError or a ValueError of it is the reason why there is none here.
        packed: False for one that knows no documents, which is held to the reference on a single one.
        timed: False for one that is only checked, since a call takes seconds.
    """

    by: str
    build: Callable[[], Function]
    packed: bool = True
    timed: bool = True


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        op: its public name.
        config: of the record: shape letters.
        draw: seed -> inputs on the device.
        outputs: names of the results.
        trained: inputs whose gradients are timed, as in a step that trains adapters; without any, forward alone.
        variants: by name; ``"reference"`` is the specification.
        forward_bytes: each input that grows with the tokens read once, each output written once.
        backward_bytes: on top of that: inputs and the output's gradient read again, the inputs' gradients written.
        checked: inputs whose gradients are checked besides, such as weights.
        gemm: m, k, n of the product whose rate bounds it; None for an op without matrix products.
        unpacked: the reference where each row is one document.
        budget: inputs and exact results -> the errors allowed to be doubled; by default the reference's own.
        choice: sizes of the op's spec.
    """

    op: str
    config: Mapping[str, object]
    draw: Callable[[int], dict[str, Tensor]]
    outputs: tuple[str, ...]
    trained: tuple[str, ...]
    variants: Mapping[str, Variant]
    forward_bytes: int
    backward_bytes: int
    checked: tuple[str, ...] = ()
    gemm: tuple[int, int, int] | None = None
    unpacked: Function | None = None
    budget: Callable[[Tensors, Tensors, Callable[..., dict[str, float]]], dict[str, float]] | None = None
    choice: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Function:
        """The specification."""
        return self.variants["reference"].build()


@dataclass(frozen=True)
class Entry:
    """How to make a case, and the shapes and token counts it is measured at by default."""

    build: Callable[[Shape, int, Run], Case]
    shapes: tuple[str, ...] = ("qwen3.5-2b", "qwen3.5-9b")
    tokens: tuple[int, ...] = (16384,)
    hybrid: bool = False


def _ours(make: Callable[[str], Function], *impls: str, compile_reference: bool = True) -> dict[str, Variant]:
    found = {impl: Variant("deltatune", functools.partial(make, impl)) for impl in (*impls, "reference")}
    if compile_reference:
        found["torch.compile(reference)"] = Variant("compile", lambda: _compiled(make("reference")))
    return found


def _compiled(function: Function) -> Function:
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _imported(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"{module} has no {name}")
    return getattr(found, name)


def _delta_sizes(shape: Shape) -> tuple[int, int, int, int]:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    H, G, K, V = (shape.values[f"linear_{name}"] for name in names)
    return H, G, K, V


def causal_conv(shape: Shape, tokens: int, run: Run) -> Case:
    """x ``[1, T, C]`` of a layer's projected q, k and v, the weight frozen in what is timed."""
    (H, G, K, V), W = _delta_sizes(shape), shape.values["linear_conv_kernel_dim"]
    C, documents = 2 * H * K + G * V, run.sequences(tokens)
    weight = run.draw(0)(C, W, scale=W**-0.5)

    def make(impl: str, sequences: Sequences | None = documents) -> Function:
        return lambda t: ops.causal_conv(t["x"], t["weight"], activation="silu", sequences=sequences, impl=impl)

    def stock(t: Tensors) -> Tensor:
        y = F.conv1d(t["x"].transpose(1, 2), t["weight"].unsqueeze(1), padding=W - 1, groups=C)
        return F.silu(y[:, :, :tokens]).transpose(1, 2)

    def fla() -> Function:
        convolve = _imported("fla.modules.causal_conv1d", "causal_conv1d")
        bounds = documents.cu_seqlens[: documents.num_sequences + 1].clone()
        return lambda t: convolve(t["x"], t["weight"], activation="silu", cu_seqlens=bounds)[0]

    def dao() -> Function:
        convolve = _imported("causal_conv1d", "causal_conv1d_fn")
        index = torch.cumsum(documents.positions == 0, dim=0, dtype=torch.int32)[None] - 1
        return lambda t: convolve(t["x"].transpose(1, 2), t["weight"], activation="silu", seq_idx=index).transpose(1, 2)

    stream = tokens * C * run.dtype.itemsize
    return Case(
        op="causal_conv",
        config={"D": C, "W": W, "activation": "silu"},
        draw=lambda seed: {"x": run.draw(seed)(1, tokens, C), "weight": weight},
        outputs=("y",),
        trained=("x",),
        checked=("weight",),
        variants={
            **_ours(make, "triton"),
            "stock eager, documents ignored": Variant("stock", lambda: stock, packed=False),
            "FLA": Variant("library", fla),
            "causal-conv1d": Variant("library", dao),
        },
        forward_bytes=2 * stream,
        backward_bytes=3 * stream,
        unpacked=make("reference", None),
    )


def gated_delta_rule(shape: Shape, tokens: int, run: Run) -> Case:
    """q and k ``[1, T, H, K]``, v ``[1, T, G, V]``, the decay in fp32 as models have it."""
    (H, G, K, V), documents = _delta_sizes(shape), run.sequences(tokens)
    names = ("q", "k", "v", "g", "beta")

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        q, k = (normal(1, tokens, H, K) for _ in range(2))
        g, beta = (normal(1, tokens, G, dtype=torch.float32).sigmoid() for _ in range(2))
        return {"q": q, "k": k, "v": normal(1, tokens, G, V), "g": -_SLOW_DECAY * g, "beta": beta.to(run.dtype)}

    def make(impl: str) -> Function:
        return lambda t: ops.gated_delta_rule(*(t[name] for name in names), sequences=documents, impl=impl)

    def direct(module: str) -> Callable[[], Function]:
        def build() -> Function:
            library = _imported(module, "chunk_gated_delta_rule")
            bounds = documents.cu_seqlens[: documents.num_sequences + 1].clone()  # both dislike empty documents
            # FlashQLA's choice of context parallelism would read the boundaries from the device
            more = {"auto_cp": False} if module == "flash_qla" else {}
            return lambda t: library(*(t[n] for n in names), use_qk_l2norm_in_kernel=True, cu_seqlens=bounds, **more)[0]

        return build

    def budget(inputs: Tensors, exact: Tensors, errors: Callable[..., dict[str, float]]) -> dict[str, float]:
        with _RoundedProducts(run.dtype):
            return errors(make("reference"), inputs, exact)

    size, values, gates = run.dtype.itemsize, tokens * G * V, tokens * G
    inputs = (2 * tokens * H * K + values + gates) * size + 4 * gates
    return Case(
        op="gated_delta_rule",
        config={"H": H, "G": G, "K": K, "V": V, "g": "float32", "decay": f"-{_SLOW_DECAY}*sigmoid"},
        draw=draw,
        outputs=("o",),
        trained=names,
        variants={
            **_ours(make, "flash_qla", "fla", compile_reference=False),
            "FlashQLA called directly": Variant("library", direct("flash_qla")),
            "FLA called directly": Variant("library", direct("fla.ops.gated_delta_rule")),
        },
        forward_bytes=inputs + values * size,
        backward_bytes=2 * inputs + values * size,
        gemm=_SQUARE,
        budget=budget,
        choice={"head_dims": (K, V)},
    )


class _RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matrix products of operands rounded to 16 bits, accumulated as before: as matrix units compute them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "deltatune":
            key = torch._C.DispatchKey.CUDA if args[0].is_cuda else torch._C.DispatchKey.CPU
            with self:  # into the op's kernel, which hides its products otherwise
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            args = [x.to(self.dtype).to(x.dtype) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


def gated_rms_norm(shape: Shape, tokens: int, run: Run) -> Case:
    """x and gate ``[1, T, G, V]`` behind the delta rule."""
    _, G, _, V = _delta_sizes(shape)
    weight = run.draw(0)(V, scale=0.1) + 1

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        return {"x": normal(1, tokens, G, V), "gate": normal(1, tokens, G, V), "weight": weight}

    def make(impl: str) -> Function:
        return lambda t: ops.gated_rms_norm(t["x"], t["gate"], t["weight"], eps=_EPS, impl=impl)

    def stock() -> Function:
        norm = _imported("transformers.models.qwen3_5.modeling_qwen3_5", "Qwen3_5RMSNormGated")(V, eps=_EPS)
        return lambda t: torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"], t["gate"]))

    def fla() -> Function:
        norm = _imported("fla.modules.norm.fused_norm_gate", "rms_norm_gated")
        return lambda t: norm(t["x"], t["gate"], t["weight"], None, activation="swish", eps=_EPS)

    stream = tokens * G * V * run.dtype.itemsize
    return Case(
        op="gated_rms_norm",
        config={"G": G, "V": V},
        draw=draw,
        outputs=("y",),
        trained=("x", "gate"),
        checked=("weight",),
        variants={**_ours(make, "triton"), "stock eager": Variant("stock", stock), "FLA": Variant("library", fla)},
        forward_bytes=3 * stream,
        backward_bytes=5 * stream,
    )


def _stock_names(shape: Shape) -> tuple[str, str]:
    """The file of transformers, and its norm."""
    family, norm = ("qwen3_5", "Qwen3_5RMSNorm") if shape.hybrid else ("qwen3", "Qwen3RMSNorm")
    return f"transformers.models.{family}.modeling_{family}", norm


def rms_norm_rope(shape: Shape, tokens: int, run: Run) -> Case:
    """q ``[1, T, N, D]`` and k ``[1, T, M, D]``; hybrids have ``1 + weight`` and q as a view of a gated projection."""
    v, offset = shape.values, shape.hybrid
    N, M, D = (v[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    R = int(D * v["rope_parameters"].get("partial_rotary_factor", 1.0))

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        angle = normal(1, tokens, R // 2, dtype=torch.float32) * 6.3
        angle = torch.cat([angle, angle], dim=-1)
        weights = {f"{x}_weight": normal(D, scale=0.1) + (0 if offset else 1) for x in "qk"}
        return {
            "q": normal(1, tokens, N, 2 * D if offset else D)[..., :D],
            "k": normal(1, tokens, M, D),
            **weights,
            "cos": angle.cos().to(run.dtype),
            "sin": angle.sin().to(run.dtype),
        }

    def make(impl: str) -> Function:
        def both(t: Tensors) -> tuple[Tensor, Tensor]:
            inputs = (t[name] for name in ("q", "k", "q_weight", "k_weight", "cos", "sin"))
            return ops.rms_norm_rope_pair(*inputs, eps=_EPS, unit_offset=offset, impl=impl)[:2]

        return both

    def stock() -> Function:
        rotate = _imported(_stock_names(shape)[0], "apply_rotary_pos_emb")
        norm = _imported(*_stock_names(shape))(D, eps=_EPS)

        def both(t: Tensors) -> tuple[Tensor, Tensor]:
            normed = (torch.func.functional_call(norm, {"weight": t[f"{x}_weight"]}, (t[x],)) for x in "qk")
            q, k = rotate(*(x.transpose(1, 2) for x in normed), t["cos"], t["sin"])
            return q.transpose(1, 2), k.transpose(1, 2)

        return both

    stream = tokens * (N + M) * D * run.dtype.itemsize
    return Case(
        op="rms_norm_rope",
        config={"N": N, "M": M, "D": D, "R": R, "unit_offset": offset},
        draw=draw,
        outputs=("q_out", "k_out"),
        trained=("q", "k"),
        checked=("q_weight", "k_weight"),
        variants={**_ours(make, "triton"), "stock eager": Variant("stock", stock)},
        forward_bytes=2 * stream,
        backward_bytes=3 * stream,
    )


def final_norm(shape: Shape, tokens: int, run: Run) -> Case:
    """x ``[1, T, 1, E]`` as the norm behind the last layer calls the op: one head, nothing rotated."""
    E, offset = shape.values["hidden_size"], shape.hybrid

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        return {"x": normal(1, tokens, 1, E), "weight": normal(E, scale=0.1) + (0 if offset else 1)}

    def make(impl: str) -> Function:
        def norm(t: Tensors) -> Tensor:
            none = t["x"].new_empty(1, tokens, 0)
            return ops.rms_norm_rope(t["x"], t["weight"], none, none, eps=_EPS, unit_offset=offset, impl=impl)

        return norm

    def stock() -> Function:
        norm = _imported(*_stock_names(shape))(E, eps=_EPS)
        return lambda t: torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"],))

    def liger() -> Function:
        norm = _imported("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
        # Qwen3.5 scales in fp32 by 1 + weight, which Liger calls gemma; Qwen3 rounds first, which it calls llama
        options = (_EPS, 1.0, "gemma", False) if offset else (_EPS, 0.0, "llama", False)
        return lambda t: norm(t["x"], t["weight"], *options)

    stream = tokens * E * run.dtype.itemsize
    return Case(
        op="rms_norm_rope",
        config={"E": E, "unit_offset": offset},
        draw=draw,
        outputs=("y",),
        trained=("x",),
        checked=("weight",),
        variants={**_ours(make, "triton"), "stock eager": Variant("stock", stock), "Liger": Variant("library", liger)},
        forward_bytes=2 * stream,
        backward_bytes=3 * stream,
    )


def linear_cross_entropy(shape: Shape, tokens: int, run: Run) -> Case:
    """Hidden states ``[T, E]`` under a frozen head ``[V, E]``; the first token of every document has no label."""
    E, V = shape.values["hidden_size"], shape.values["vocab_size"]
    weight = run.draw(0)(V, E, scale=E**-0.5)
    ignored = run.sequences(tokens).positions == 0

    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(run.device).manual_seed(seed)
        labels = torch.randint(0, V, (tokens,), generator=generator, device=run.device).masked_fill(ignored, -100)
        return {"hidden": run.draw(seed)(tokens, E), "weight": weight, "labels": labels}

    def make(impl: str) -> Function:
        return lambda t: ops.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], impl=impl)

    def stock(t: Tensors) -> Tensor:
        return F.cross_entropy(F.linear(t["hidden"], t["weight"]).float(), t["labels"], reduction="sum")

    def library(module: str, name: str, **options: object) -> Callable[[], Function]:
        def build() -> Function:
            loss = _imported(module, name)
            return lambda t: loss(t["hidden"], t["weight"], t["labels"], reduction="sum", **options)

        return build

    stream, head = tokens * E * run.dtype.itemsize, V * E * run.dtype.itemsize
    return Case(
        op="linear_cross_entropy",
        config={"E": E, "V": V, "weight": "frozen"},
        draw=draw,
        outputs=("loss",),
        trained=("hidden",),
        variants={
            **_ours(make, "triton", "torch", compile_reference=False),
            "stock eager, whole logits": Variant("stock", lambda: stock),
            "torch.compile(stock)": Variant("compile", lambda: _compiled(stock)),
            "Liger": Variant(
                "library", library("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
            ),
            "cut-cross-entropy, filter_eps=None": Variant(
                "library", library("cut_cross_entropy", "linear_cross_entropy", filter_eps=None)
            ),
        },
        forward_bytes=stream + head,
        backward_bytes=2 * stream + head,
        # the logits of all tokens at once would take 8 GiB
        gemm=(min(tokens, 4096), E, V),
        budget=functools.partial(_loss_budget, make("reference")),
    )


def _loss_budget(
    reference: Function, inputs: Tensors, exact: Tensors, errors: Callable[..., dict[str, float]]
) -> dict[str, float]:
    """The reference's own for the gradient; for the loss, what logits in the dtype of the model make of it.

    A sum over thousands of tokens may be right by chance: its budget is the root of the summed squares of the tokens'
    errors, and one rounding of the fp32 sum itself.
    """
    squares, head = 0.0, inputs["weight"].double()
    for hidden, labels in zip(*(torch.split(inputs[name], 1024) for name in ("hidden", "labels")), strict=True):
        rounded = F.cross_entropy(F.linear(hidden, inputs["weight"]).double(), labels, reduction="none")
        squares += float((rounded - F.cross_entropy(hidden.double() @ head.T, labels, reduction="none")).square().sum())
    rounding = torch.finfo(torch.float32).eps
    loss = math.hypot(math.sqrt(squares) / float(exact["loss"].abs()), rounding)
    return errors(reference, inputs, exact) | {"loss": loss}


def varlen_attention(shape: Shape, tokens: int, run: Run) -> Case:
    """q ``[1, T, N, D]``, k and v ``[1, T, M, D]``, causal inside documents."""
    N, M, D = (shape.values[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    documents = run.sequences(tokens)
    bounds, longest = documents.cu_seqlens[: documents.num_sequences + 1].clone(), documents.max_length
    index = torch.cumsum(documents.positions == 0, dim=0)

    def make(impl: str) -> Function:
        return lambda t: ops.varlen_attention(t["q"], t["k"], t["v"], sequences=documents, impl=impl)

    def varlen() -> Function:
        attend = _imported("torch.nn.attention.varlen", "varlen_attn")
        if run.device.type != "cuda":
            raise ValueError("torch's varlen attention needs a GPU")
        # torch 2.13 wants to be told of fewer key heads
        more = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
        span = (bounds, bounds, longest, longest)
        return lambda t: attend(*(t[name][0] for name in "qkv"), *span, window_size=(-1, 0), **more)[None]

    def sdpa() -> Function:
        mask = (index[:, None] == index[None, :]).tril_()

        def run_(t: Tensors) -> Tensor:
            q, k, v = (t[name].transpose(1, 2) for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        return run_

    def flex() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if run.device.type != "cuda":
            raise ValueError("FlexAttention has no backward without a GPU")

        def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (index[query] == index[key])

        mask = create_block_mask(visible, None, None, tokens, tokens, device=str(run.device))
        attend = torch.compile(flex_attention, dynamic=False)

        def run_(t: Tensors) -> Tensor:
            q, k, v = (t[name].transpose(1, 2) for name in "qkv")
            out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=True)
            return out.transpose(1, 2)

        return run_

    queries, keys = (tokens * heads * D * run.dtype.itemsize for heads in (N, M))

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        return {"q": normal(1, tokens, N, D), "k": normal(1, tokens, M, D), "v": normal(1, tokens, M, D)}

    return Case(
        op="varlen_attention",
        config={"N": N, "M": M, "D": D},
        draw=draw,
        outputs=("o",),
        trained=("q", "k", "v"),
        variants={
            **_ours(make, "torch", compile_reference=False),
            "torch varlen_attn": Variant("library", varlen),
            "stock eager SDPA, T x T mask": Variant("stock", sdpa),
            "FlexAttention, compiled": Variant("library", flex),
        },
        forward_bytes=2 * queries + 2 * keys,
        backward_bytes=4 * queries + 4 * keys,
        gemm=_SQUARE,
        choice={"head_dim": D},
    )


def moe_experts(shape: Shape, tokens: int, run: Run, *, rank: int = 0, busiest: int = moe_cases.BALANCED) -> Case:
    """x ``[T, H]`` through its experts, the weights frozen; with a rank, adapters on all experts train."""
    sizes = moe_cases.sizes_of(shape)
    weights = moe_cases.draw_weights(run.draw(0), sizes)
    spec = {"weight_shape": torch.Size((sizes.experts, 2 * sizes.inner, sizes.hidden))}

    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(run.device).manual_seed(seed)
        return weights | moe_cases.draw_inputs(run.draw(seed), generator, sizes, tokens, busiest=busiest, rank=rank)

    def make(impl: str) -> Function:
        ops.choose(ops.GroupedMmSpec(run.device, run.dtype, **spec), impl)  # or why it cannot run
        function = moe_cases.ours(impl, sizes, rank)
        return function if impl == "reference" else _compiled(function)

    stock = moe_cases.baselines(shape, sizes, rank, weights, run.device)
    stream, rows = tokens * sizes.hidden * run.dtype.itemsize, tokens * sizes.top_k
    moved = 2 * rows * sizes.hidden * run.dtype.itemsize + sum(w.numel() * w.element_size() for w in weights.values())
    return Case(
        op="grouped_mm",
        config={**sizes._asdict(), "rank": rank, "busiest": busiest},
        draw=draw,
        outputs=("y",),
        trained=("x", *(f"{name}_{factor}" for name in ("up", "down") for factor in "AB" if rank)),
        variants={
            **_ours(make, "torch", "triton", "quack", compile_reference=False),
            "reference": Variant("deltatune", functools.partial(make, "reference"), timed=False),
            **{name: Variant(by, build) for name, by, build in stock},
        },
        forward_bytes=2 * stream + moved,
        backward_bytes=2 * stream + moved,
        gemm=_SQUARE,
        choice=spec,
    )


def gated_activation_lora(shape: Shape, tokens: int, run: Run, *, rank: int = gated_cases.RANKS[0]) -> Case:
    """x ``[T, E]`` to the gate ``[T, N]`` of its MLP, the weights frozen, adapters on both projections trained."""
    E, N = shape.values["hidden_size"], shape.values["intermediate_size"]
    weights = gated_cases.draw_weights(run.draw(0), E, N)

    def draw(seed: int) -> dict[str, Tensor]:
        normal = run.draw(seed)
        return {"x": normal(tokens, E), **weights, **gated_cases.draw_factors(normal, E, N, rank)}

    def make(impl: str) -> Function:
        ops.choose(ops.LoraGatedSpec(run.device, run.dtype, width=rank), impl)  # or why it cannot run
        function = gated_cases.ours(impl)
        return function if impl == "reference" else _compiled(function)

    def budget(inputs: Tensors, exact: Tensors, errors: Callable[..., dict[str, float]]) -> dict[str, float]:
        return errors(gated_cases.separate, inputs, exact)

    read, written, frozen = tokens * E, tokens * N, 2 * N * E
    return Case(
        op="lora_gated",
        config={"E": E, "N": N, "rank": rank, "activation": "silu"},
        draw=draw,
        outputs=("h",),
        trained=("x", *gated_cases.FACTORS),
        variants={
            **_ours(make, "triton"),
            **{name: Variant(by, build) for name, by, build in gated_cases.baselines(weights, rank, run.device)},
        },
        forward_bytes=(read + written + frozen) * run.dtype.itemsize,
        backward_bytes=(2 * read + written + frozen) * run.dtype.itemsize,
        gemm=(tokens, E, N),
        budget=budget,
        choice={"width": rank},
    )


def dequantize(shape: Shape, tokens: int, run: Run, *, format: str) -> Case:
    """The frozen matrices of a layer's MLP, of a mixture all experts, each of which has rows of the tokens."""
    sizes = decode_cases.matrices(shape)
    experts = {"experts": sizes["up"][0]} if len(sizes["up"]) == 3 else {}

    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(run.device).manual_seed(seed)
        found = {"like": run.draw(seed)(1)}
        for name, size in sizes.items():
            parts = decode_cases.draw_parts(generator, format, size)
            found |= {f"{name}.{part}": x for part, x in parts.items()}
        for number in experts.values():
            ends = torch.arange(1, number + 1, device=run.device) * max(tokens, number) // number
            found["offsets"] = ends.int()
        return found

    def make(impl: str) -> Function:
        ops.choose(ops.DequantizeSpec(run.device, run.dtype), impl)  # or why it cannot run
        return decode_cases.ours(format, sizes, impl)

    stored = sum(x.nbytes for x in draw(0).values())
    values = sum(math.prod(size) for size in sizes.values())
    return Case(
        op="dequantize",
        config={"format": format, "hidden": sizes["down"][-2], "inner": sizes["down"][-1], **experts},
        draw=draw,
        outputs=tuple(sizes),
        trained=(),
        variants={
            **_ours(make, "triton", compile_reference=False),
            "torch.compile(reference)": Variant("compile", lambda: _compiled(decode_cases.plain(format, sizes))),
            **{name: Variant(by, build) for name, by, build in decode_cases.baselines(format, sizes)},
        },
        forward_bytes=stored + values * run.dtype.itemsize,
        backward_bytes=0,
    )


_MOE: Final = functools.partial(Entry, shapes=("qwen3.5-35b-a3b", "gpt-oss-20b"), tokens=(8192, 16384))
_DECODED: Final = ("qwen3.5-35b-a3b", "gpt-oss-20b", "qwen3.5-9b")
CASES: Final[Mapping[str, Entry]] = {
    "gated_delta_rule": Entry(gated_delta_rule, hybrid=True),
    "causal_conv": Entry(causal_conv, hybrid=True),
    "rms_norm_rope": Entry(rms_norm_rope, shapes=("qwen3.5-9b", "qwen3-14b"), tokens=(8192, 16384, 32768)),
    "final_norm": Entry(final_norm),
    "gated_rms_norm": Entry(gated_rms_norm, hybrid=True),
    "linear_cross_entropy": Entry(linear_cross_entropy),
    "varlen_attention": Entry(varlen_attention),
    "gated_activation_lora": Entry(gated_activation_lora),
    "gated_activation_lora_rank64": Entry(functools.partial(gated_activation_lora, rank=gated_cases.RANKS[1])),
    "moe_experts": _MOE(moe_experts),
    "moe_experts_skewed": _MOE(functools.partial(moe_experts, busiest=moe_cases.SKEWED)),
    "moe_experts_lora": _MOE(functools.partial(moe_experts, rank=moe_cases.RANK)),
    "moe_experts_lora_skewed": _MOE(functools.partial(moe_experts, rank=moe_cases.RANK, busiest=moe_cases.SKEWED)),
    **{
        f"dequantize_{format}": Entry(functools.partial(dequantize, format=format), shapes=_DECODED)
        for format in decode_cases.FORMATS
    },
}
"""Op, or an op in the form that a layer calls, -> how to measure it."""
