"""Experts with adapters on a GPU: errors within twice those of plain bf16, and nothing waits for the device."""

# T tokens, K experts of a token, X experts, H hidden width, WIDTH of an expert, RANK of an adapter

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.ops import Adapter, ExpertLinear, moe_experts

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NO_QUACK = pytest.mark.skipif(find_spec("quack") is None, reason="quack is not installed")
#: who multiplies, and whether experts have adapters, which train then
WAYS = [("torch", True), ("triton", True), *(pytest.param("quack", a, marks=NO_QUACK) for a in (True, False))]
T, K, X, H, WIDTH, RANK = 700, 4, 16, 256, 128, 16


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(rows: Tensor) -> Tensor:
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


#: gate, and whether weights are stored transposed, with biases
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {"gated": (swiglu, False), "gpt-oss": (clamped, True)}


def inputs(layout: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(to)

    of = {"x": normal(T, H, scale=1.0), "weights": torch.rand(T, K, generator=generator, device="cuda")}
    for name, (fan_in, fan_out) in {"up": (H, 2 * WIDTH), "down": (WIDTH, H)}.items():
        shape = (X, fan_in, fan_out) if LAYOUTS[layout][1] else (X, fan_out, fan_in)
        of[name] = normal(*shape, scale=fan_in**-0.5)
        of[f"{name}_A"] = normal(X * RANK, fan_in, scale=fan_in**-0.5, to=torch.float32)
        of[f"{name}_B"] = normal(fan_out, RANK * X, scale=RANK**-0.5, to=torch.float32)
        if LAYOUTS[layout][1]:
            of[f"{name}_bias"] = normal(X, fan_out, scale=0.3)
    return of


def linear(of: dict[str, Tensor], name: str, layout: str) -> ExpertLinear:
    weight = of[name].mT if LAYOUTS[layout][1] else of[name]
    if f"{name}_A" not in of:
        return ExpertLinear(weight, of.get(f"{name}_bias"), [])
    a, b = of[f"{name}_A"].view(X, RANK, -1), of[f"{name}_B"].view(-1, RANK, X).permute(2, 0, 1)
    return ExpertLinear(weight, of.get(f"{name}_bias"), [Adapter(a, b, 0.5)])


def taken(of: dict[str, Tensor], *, adapted: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The inputs of experts with adapters or frozen ones, and the names of those that train."""
    of = {name: tensor for name, tensor in of.items() if adapted or not name.endswith(("_A", "_B"))}
    trained = [name for name in of if adapted or name in ("x", "weights")]
    return {name: tensor.requires_grad_(name in trained) for name, tensor in of.items()}, trained


def run(of: dict[str, Tensor], index: Tensor, layout: str, impl: str) -> Tensor:
    up, down = (linear(of, name, layout) for name in ("up", "down"))
    return moe_experts(of["x"], index, of["weights"], up, down, LAYOUTS[layout][0], impl=impl)


def plain(of: dict[str, Tensor], index: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """Expert by expert, base and adapter as products of their own, in one dtype."""
    of = {name: tensor.to(dtype) for name, tensor in of.items()}
    y = torch.zeros(T, H, dtype=dtype, device="cuda")
    for expert in range(X):
        rows = of["x"]
        for name in ("up", "down"):
            layer = linear(of, name, layout)
            bias, narrow = layer.bias, rows
            rows = rows @ layer.weight[expert].T
            for a, b, s in layer.adapters:
                rows = rows + s * ((narrow @ a[expert].T) @ b[expert].T)
            rows = rows if bias is None else rows + bias[expert]
            rows = LAYOUTS[layout][0](rows) if name == "up" else rows
        y = y + (of["weights"] * (index == expert)).sum(-1, keepdim=True) * rows
    return y


def routings() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(1)
    scores = torch.rand(T, X, generator=generator, device="cuda")
    yield "balanced", scores.topk(K).indices
    scores[: T // 2, 3] = 2.0
    scores[:, 5] = -1.0
    skewed = scores.topk(K).indices
    yield "half on one, none on another", skewed
    absent = torch.rand(T, K, generator=generator, device="cuda") < 0.3
    yield "absent slots", torch.where(absent, torch.where(skewed % 2 == 0, -1, X), skewed)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("impl", "adapted"), WAYS)
@pytest.mark.parametrize("compiled", [False, True])
def test_errors_are_within_twice_those_of_plain_products(layout: str, impl: str, adapted: bool, compiled: bool) -> None:
    function: Any = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    of, trained = taken(inputs(layout), adapted=adapted)
    leaves = [of[name] for name in trained]
    grad = torch.randn(T, H, generator=torch.Generator("cuda").manual_seed(2), device="cuda").bfloat16()
    for name, index in routings():
        exact = plain(of, index, layout, torch.float64)
        exact = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
        simple = plain(of, index, layout, torch.bfloat16)
        budget = errors([simple, *torch.autograd.grad(simple, leaves, grad)], exact)
        found = function(of, index, layout, impl)
        got = errors([found, *torch.autograd.grad(found, leaves, grad)], exact)
        over = {n: (e, b) for n, e, b in zip(["y", *trained], got, budget, strict=True) if not e <= 2 * b}
        assert not over, (name, over)
        assert not found[((index < 0) | (index >= X)).all(1)].any()


@pytest.mark.parametrize(("impl", "adapted"), WAYS)
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_waits_for_the_device(impl: str, adapted: bool, compiled: bool) -> None:
    function: Any = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    of, _ = taken(inputs("gated"), adapted=adapted)
    for name in ("up", "down", "weights"):
        of[name].requires_grad_(False)
    trained = [tensor for tensor in of.values() if tensor.requires_grad]

    def step(index: Tensor) -> None:
        torch.autograd.grad(function(of, index, "gated", impl).float().square().sum(), trained)

    packs = [index for _, index in routings()]
    step(packs[0])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in packs:
            step(index)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("dtype", "impl"),
    [(torch.float16, "auto"), (torch.float32, "auto"), pytest.param(torch.float16, "quack", marks=NO_QUACK)],
)
def test_other_dtypes(dtype: torch.dtype, impl: str) -> None:
    of = {name: tensor.requires_grad_() for name, tensor in inputs("gated", dtype).items()}
    (_, index), *_ = routings()
    exact, found = plain(of, index, "gated", torch.float64), run(of, index, "gated", impl)
    assert found.dtype == dtype
    bound = 2e-3 if dtype == torch.float16 else 2e-6
    grads = [torch.autograd.grad(y.double().sum(), list(of.values())) for y in (found, exact)]
    assert errors([found], [exact])[0] <= bound
    assert max(errors(*map(list, grads))) <= 5 * bound
