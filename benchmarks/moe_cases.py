"""The routed experts of a layer at the shapes of models: frozen, and with adapters on all of them."""

# T tokens, k experts of a token, R = T * k rows, X experts, H hidden width, I width of an expert, r rank of an expert

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import quack_experts
from benchmarks.shapes import Shape
from deltatune import ops
from deltatune.ops import Adapter, ExpertLinear
from deltatune.ops._grouped_mm.routing import combine, route

__all__ = [
    "BALANCED",
    "FLOOR",
    "RANK",
    "SKEWED",
    "Sizes",
    "baselines",
    "draw_inputs",
    "draw_weights",
    "ours",
    "sizes_of",
]

#: What no block can go without; its result is no answer, so the check of it is red.
FLOOR: Final = "moves and grouped products alone"
#: Rows of the busiest expert over those of the mean one.
BALANCED: Final = 1
SKEWED: Final = 16
RANK: Final = 16
_SCALE: Final = 2.0
_FACTOR_NAMES: Final = ("up_A", "up_B", "down_A", "down_B")


class Sizes(NamedTuple):
    """X, k, H and I; gpt-oss stores weights transposed, gate and up by turns, with biases."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    gpt_oss: bool = False


def sizes_of(shape: Shape) -> Sizes:
    """Of a model's mixtures."""
    gpt_oss = shape.model_type == "gpt_oss"
    experts, inner = ("num_local_experts", "intermediate_size") if gpt_oss else ("num_experts", "moe_intermediate_size")
    v = shape.values
    return Sizes(v[experts], v["num_experts_per_tok"], v["hidden_size"], v[inner], gpt_oss)


def draw_weights(normal: Callable[..., Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Both weights of all experts, as they are stored, and their biases where there are any."""
    found = {}
    for name, (fan_in, fan_out) in {"up": (sizes.hidden, 2 * sizes.inner), "down": (sizes.inner, sizes.hidden)}.items():
        sides = (fan_in, fan_out) if sizes.gpt_oss else (fan_out, fan_in)
        found[name] = normal(sizes.experts, *sides, scale=fan_in**-0.5)
        if sizes.gpt_oss:
            found[f"{name}_bias"] = normal(sizes.experts, fan_out, scale=0.1)
    return found


def draw_inputs(
    normal: Callable[..., Tensor], generator: torch.Generator, sizes: Sizes, tokens: int, *, busiest: int, rank: int
) -> dict[str, Tensor]:
    """Hidden states, routing and, with a rank, factors in fp32 in PEFT's order; ``busiest`` as BALANCED and SKEWED."""
    experts, top_k, hidden, inner, _ = sizes
    scores = torch.rand(tokens, experts, generator=generator, device=generator.device)
    share = min(1.0, busiest * top_k / experts)
    if busiest > 1:
        scores[torch.rand(tokens, generator=generator, device=generator.device) < share, 0] = 2.0
    chosen = scores.topk(top_k, dim=-1)
    found = {"x": normal(tokens, hidden), "index": chosen.indices, "weights": chosen.values.softmax(-1)}
    if rank:
        for name, (fan_in, fan_out) in {"up": (hidden, 2 * inner), "down": (inner, hidden)}.items():
            found[f"{name}_A"] = normal(experts * rank, fan_in, dtype=torch.float32, scale=fan_in**-0.5)
            found[f"{name}_B"] = normal(fan_out, rank * experts, dtype=torch.float32, scale=rank**-0.5)
    return found


def gate_of(sizes: Sizes) -> Callable[[Tensor], Tensor]:
    """``silu(first half) * second half``, or gpt-oss's of every second column."""

    def swiglu(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate) * up

    def clamped(rows: Tensor) -> Tensor:
        gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    return clamped if sizes.gpt_oss else swiglu


def _upright(sizes: Sizes, t: Any, name: str) -> Tensor:
    """``[X, N, K]``."""
    weight: Tensor = t[name]
    return weight.mT if sizes.gpt_oss else weight


def ours(impl: str, sizes: Sizes, rank: int) -> Callable[[Any], Tensor]:
    """``ops.moe_experts``."""

    def adapters(t: Any, name: str) -> list[Adapter]:
        return [Adapter(*_by_expert(sizes, rank, t, name), _SCALE)] if rank else []

    def run(t: Any) -> Tensor:
        up, down = (
            ExpertLinear(_upright(sizes, t, name), t.get(f"{name}_bias"), adapters(t, name)) for name in ("up", "down")
        )
        return ops.moe_experts(t["x"], t["index"], t["weights"], up, down, gate_of(sizes), impl=impl)

    return run


def baselines(
    shape: Shape, sizes: Sizes, rank: int, weights: Any, device: torch.device
) -> Iterable[tuple[str, str, Callable[[], Any]]]:
    """Name, whose it is, and how to build it."""

    def stock(*, compiled: bool) -> Callable[[Any], Tensor]:
        module = _stock_experts(shape, sizes, weights, device)
        run = torch.compile(module, dynamic=False) if compiled else module
        return lambda t: run(t["x"], t["index"], t["weights"].to(t["x"].dtype))

    def peft() -> Callable[[Any], Tensor]:
        import peft as library

        holder = nn.ModuleDict({"experts": _stock_experts(shape, sizes, weights, device)})
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = library.LoraConfig(r=rank, lora_alpha=int(_SCALE * rank), target_parameters=names)
        wrapped = library.inject_adapter_in_model(config, holder)["experts"].to(device)
        paths = ("base_layer.lora_A", "base_layer.lora_B", "lora_A", "lora_B")
        named = {f"{path}.default.weight": name for path, name in zip(paths, _FACTOR_NAMES, strict=True)}

        def run(t: Any) -> Tensor:
            given = {path: t[name] for path, name in named.items()}
            routed = (t["x"], t["index"], t["weights"].to(t["x"].dtype))
            result: Tensor = torch.func.functional_call(wrapped, given, routed)
            return result

        return run

    def separate() -> Callable[[Any], Tensor]:
        if not hasattr(F, "grouped_mm"):
            raise ImportError("torch has no grouped_mm")
        run = torch.compile(functools.partial(_separate_products, sizes), dynamic=False)
        return lambda t: run(t, {name: _factors(sizes, rank, t, name) for name in ("up", "down")})

    def liger() -> Callable[[Any], Tensor]:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        if sizes.gpt_oss:
            raise ValueError("Liger's experts have SwiGLU alone")
        apply = LigerFusedMoEFunction.apply
        return lambda t: apply(t["x"], t["up"], t["down"], t["index"].int(), t["weights"].to(t["x"].dtype))

    def quack() -> Callable[[Any], Tensor]:
        if sizes.gpt_oss:
            raise ValueError("quack's gates have no clamps")
        if not rank:
            run = quack_experts.frozen()
            return lambda t: run(t["x"], t["index"], t["weights"], t["up"], t["down"])
        run = quack_experts.adapted(_SCALE)

        def with_factors(t: Any) -> Tensor:
            factors = [factor for name in ("up", "down") for factor in _by_expert(sizes, rank, t, name)]
            return run(t["x"], t["index"], t["weights"], t["up"], t["down"], *factors)

        return with_factors

    if rank:
        yield "stock + PEFT target_parameters", "stock", peft
        yield "separate grouped products, compiled", "library", separate
        yield "quack's products", "library", quack
    else:
        yield FLOOR, "library", lambda: torch.compile(functools.partial(_moves_and_products, sizes), dynamic=False)
        yield "stock grouped_mm", "stock", functools.partial(stock, compiled=False)
        yield "stock grouped_mm, compiled", "stock", functools.partial(stock, compiled=True)
        yield "Liger", "library", liger
        yield "quack, gather and gate inside its products", "library", quack


def _stock_experts(shape: Shape, sizes: Sizes, weights: Any, device: torch.device) -> nn.Module:
    """transformers' experts by its grouped products, around the case's own weights."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

    config = shape.config()
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: Any = GptOssExperts(config) if sizes.gpt_oss else Qwen3_5MoeExperts(config)
    for name, tensor in weights.items():
        stock = {"up": "gate_up_proj", "down": "down_proj"}[name.removesuffix("_bias")] + name[
            len(name.split("_")[0]) :
        ]
        assert getattr(module, stock).shape == tensor.shape
        setattr(module, stock, nn.Parameter(tensor, requires_grad=False))
    moved: nn.Module = module.to(device)
    return moved


def _by_expert(sizes: Sizes, rank: int, t: Any, name: str) -> tuple[Tensor, Tensor]:
    """A ``[X, r, K]`` and B ``[X, N, r]``, views."""
    a, b = t[f"{name}_A"], t[f"{name}_B"]
    return a.view(sizes.experts, rank, -1), b.view(b.shape[0], rank, sizes.experts).permute(2, 0, 1)


def _factors(sizes: Sizes, rank: int, t: Any, name: str) -> tuple[Tensor, Tensor]:
    """The same, dense and in the dtype of x; not compiled, which would take another order of dims."""
    a, b = (factor.to(t["x"].dtype) for factor in _by_expert(sizes, rank, t, name))
    return a, b.contiguous()


def _moves_and_products(sizes: Sizes, t: Any) -> Tensor:
    """Rows gathered, both products by torch, and each token's rows summed: no gate, no weights."""
    routing = route(t["index"], sizes.experts)
    copies = routing.copies(sizes.top_k)
    up, down = (_upright(sizes, t, name).mT for name in ("up", "down"))
    inner = F.grouped_mm(_Gather.apply(t["x"], *copies), up, offs=routing.offsets)  # type: ignore[no-untyped-call]
    return combine(F.grouped_mm(inner[:, : sizes.inner], down, offs=routing.offsets), copies)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[source]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return dy[places].sum(1), None, None


def _separate_products(sizes: Sizes, t: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """LoRA of experts as two grouped products more for each weight and an addition, by torch's own."""
    slots = t["index"].flatten()
    order = slots.argsort(stable=True)
    offsets = slots.bincount(minlength=sizes.experts).cumsum(0).int()

    def linear(rows: Tensor, name: str) -> Tensor:
        a, b = factors[name]
        narrow = F.grouped_mm(rows, a.mT, offs=offsets)
        base = F.grouped_mm(rows, _upright(sizes, t, name).mT, offs=offsets)
        bias = t[f"{name}_bias"][slots[order]] if sizes.gpt_oss else 0
        return base + _SCALE * F.grouped_mm(narrow, b.mT, offs=offsets) + bias

    rows = linear(gate_of(sizes)(linear(t["x"][order // sizes.top_k], "up")), "down")
    weighted = rows * t["weights"].flatten()[order].unsqueeze(-1).to(rows.dtype)
    return torch.zeros_like(t["x"]).index_add(0, order // sizes.top_k, weighted)
