"""Adapters of grouped linear layers, absent rows, and experts of every layout, against float64 written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltatune.ops import Adapter, Choice, ExpertLinear, GroupedMmSpec, grouped_linear, moe_experts
from deltatune.ops._grouped_mm import api, experts, reference

SIZES = {"mixed": [5, 1, 0, 20, 7], "first empty": [0, 9, 8], "all on one": [0, 17, 0], "none": [0, 0]}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)


def problem(sizes: list[int], dtype: torch.dtype, absent: int = 3, ranks: tuple[int, ...] = (4, 20)) -> dict[str, Any]:
    groups = len(sizes)
    x, weight = random(sum(sizes) + absent, 24, dtype=dtype) * 4, random(groups, 40, 24, dtype=dtype)
    factors = [f for i, r in enumerate(ranks) for f in (random(groups, r, 24, seed=i), random(groups, 40, r, seed=i))]
    return {"x": x, "weight": weight, "offsets": torch.tensor(sizes).cumsum(0).int(), "factors": factors}


def adapters_of(factors: list[Tensor], scales: tuple[float, ...] = (0.5, -1.5)) -> list[Adapter]:
    return [Adapter(a, b, s) for a, b, s in zip(factors[::2], factors[1::2], scales, strict=False)]


def oracle(x: Tensor, weight: Tensor, offsets: Tensor, adapters: list[Adapter]) -> Tensor:
    ends = [0, *offsets.tolist()]
    rows = []
    for group, (start, end) in enumerate(pairwise(ends)):
        effective = weight[group].double()
        for a, b, s in adapters:
            effective = effective + s * b[group].double() @ a[group].double()
        rows.append(x[start:end].double() @ effective.T)
    return torch.cat([*rows, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1], dtype=torch.float64)])


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adapters_equal_effective_weights(sizes: list[int], dtype: torch.dtype, bound: float) -> None:
    of = problem(sizes, dtype)
    leaves = [of["x"], of["weight"], *of["factors"]]
    for leaf in leaves:
        leaf.requires_grad_()
    found = grouped_linear(of["x"], of["weight"], of["offsets"], adapters=adapters_of(of["factors"]))
    expected = oracle(of["x"], of["weight"], of["offsets"], adapters_of(of["factors"]))
    assert found.dtype == dtype
    assert relative(found, expected) <= bound
    grad = random(*found.shape, seed=7)
    grads = torch.autograd.grad(found, leaves, grad.to(dtype))
    for leaf, got, want in zip(leaves, grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert got.dtype == leaf.dtype
        assert relative(got, want) <= bound


@pytest.mark.parametrize("trained", ["x", "weight", "A", "B", "x and A", "x and B", "nothing"])
def test_each_gradient_alone(trained: str) -> None:
    of = problem([5, 0, 12], torch.float64, ranks=(4,))
    leaves = {"x": of["x"], "weight": of["weight"], "A": of["factors"][0], "B": of["factors"][1]}
    chosen = [leaves[name].requires_grad_() for name in trained.split(" and ") if name in leaves]
    found, expected = (run(of["x"], of["weight"], of["offsets"], adapters_of(of["factors"])) for run in (_ours, oracle))
    if not chosen:
        assert not found.requires_grad
        return
    grads, wanted = (torch.autograd.grad(y.square().sum(), chosen) for y in (found, expected))
    for got, want in zip(grads, wanted, strict=True):
        assert relative(got, want) <= 1e-12


def _ours(x: Tensor, weight: Tensor, offsets: Tensor, adapters: list[Adapter]) -> Tensor:
    return grouped_linear(x, weight, offsets, adapters=adapters)


def test_absent_rows_give_and_get_nothing_whatever_they_hold() -> None:
    of = problem([5, 0, 12], torch.float32)
    leaves = [of["x"], of["weight"], *of["factors"]]

    def outcome(absent: float) -> list[Tensor]:
        x = torch.cat([of["x"][:17], torch.full_like(of["x"][17:], absent)]).requires_grad_()
        others = [leaf.detach().requires_grad_() for leaf in leaves[1:]]
        y = grouped_linear(x, others[0], of["offsets"], adapters=adapters_of(others[1:]))
        assert not y[17:].any()
        grads = torch.autograd.grad(y, [x, *others], torch.cat([torch.ones(17, 40), torch.full((3, 40), absent)]))
        assert not grads[0][17:].any()
        return [y, *grads]

    for got, want in zip(outcome(float("nan")), outcome(0.0), strict=True):
        assert torch.equal(got, want)


def test_what_is_kept_for_backward_beside_the_parameters_is_the_rows_and_their_narrow_products() -> None:
    of = problem([5, 0, 12], torch.float32, ranks=(4,))
    for factor in of["factors"]:
        factor.requires_grad_()
    own = {leaf.data_ptr() for leaf in (of["x"], of["weight"], of["offsets"], *of["factors"])}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _ours(of["x"], of["weight"], of["offsets"], adapters_of(of["factors"]))
    assert [tuple(t.shape) for t in kept if t.ndim > 1 and t.data_ptr() not in own] == [(20, 16)]


@pytest.mark.parametrize("name", ["weight", "A", "B"])
def test_backward_reads_the_storage_that_forward_read(name: str) -> None:
    """Where a tool gives a Parameter another one in between (``.data = ...``)."""
    grads = []
    for exchanged in (False, True):
        of = problem([5, 0, 12], torch.float64, ranks=(4,))
        leaves = {"x": of["x"], "weight": of["weight"], "A": of["factors"][0], "B": of["factors"][1]}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = _ours(of["x"], of["weight"], of["offsets"], adapters_of(of["factors"]))
        if exchanged:
            leaves[name].data = leaves[name].data * 2
        grads.append(torch.autograd.grad(y.sum(), list(leaves.values())))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", ["rank", "groups", "width"])
def test_adapters_that_do_not_fit(bad: str) -> None:
    of = problem([5, 0, 12], torch.float32, ranks=(4,))
    a, b = of["factors"]
    a, b = {"rank": (a, b[..., :3]), "groups": (a[:2], b[:2]), "width": (a[..., :8], b)}[bad]
    with pytest.raises(ValueError, match=r"expected adapters A \[G, r, K\] and B \[G, N, r\].*got A"):
        _ours(of["x"], of["weight"], of["offsets"], adapters_of([a, b]))


# ---- experts: T tokens, k experts each, X experts, H hidden width, WIDTH of an expert


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(rows: Tensor) -> Tensor:
    gate, up = rows[..., ::2].clamp(max=1.0), rows[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int, bool, bool]] = {
    # gate, width before it over that behind it, stored transposed, biases
    "gated": (swiglu, 2, False, False),
    "gpt-oss": (clamped, 2, True, True),
    "plain": (F.gelu, 1, False, False),
    "plain with biases": (F.gelu, 1, False, True),
}
T, K, X, H, WIDTH = 21, 3, 6, 16, 24


def mixture(layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    _, times, transposed, biased = LAYOUTS[layout]
    outer = times * WIDTH
    shapes = {"up": (X, outer, H), "down": (X, H, WIDTH)}
    of = {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}
    if transposed:
        of = {name: weight.mT.contiguous() for name, weight in of.items()}
    if biased:
        of |= {"up_bias": random(X, outer, dtype=dtype), "down_bias": random(X, H, seed=1, dtype=dtype)}
    for name, (fan_in, fan_out) in {"up": (H, outer), "down": (WIDTH, H)}.items():
        # PEFT's order: A expert by expert, B with the experts innermost
        of[f"{name}_A"], of[f"{name}_B"] = random(X * 4, fan_in, seed=2), random(fan_out, 4 * X, seed=3) * 2
    of["x"] = random(T, H, dtype=dtype) * 4
    of["weights"] = torch.rand(T, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    return of


def linear(of: dict[str, Tensor], name: str, transposed: bool) -> ExpertLinear:
    a, b = of[f"{name}_A"].view(X, 4, -1), of[f"{name}_B"].view(-1, 4, X).permute(2, 0, 1)
    weight = of[name].mT if transposed else of[name]
    return ExpertLinear(weight, of.get(f"{name}_bias"), [Adapter(a, b, 0.5)])


def run(of: dict[str, Tensor], index: Tensor, layout: str, max_rows: int | None = None) -> Tensor:
    gate, _, transposed, _ = LAYOUTS[layout]
    up, down = (linear(of, name, transposed) for name in ("up", "down"))
    return moe_experts(of["x"], index, of["weights"], up, down, gate, max_rows=max_rows)


def expected(of: dict[str, Tensor], index: Tensor, layout: str) -> Tensor:
    gate, _, transposed, _ = LAYOUTS[layout]
    of = {name: tensor.double() for name, tensor in of.items()}
    y = torch.zeros(T, H, dtype=torch.float64)
    for expert in range(X):
        rows = of["x"]
        for name in ("up", "down"):
            layer = linear(of, name, transposed)
            (a, b, s), bias = layer.adapters[0], layer.bias
            rows = rows @ (layer.weight[expert] + s * b[expert] @ a[expert]).T
            rows = rows if bias is None else rows + bias[expert]
            rows = gate(rows) if name == "up" else rows
        y = y + (of["weights"] * (index == expert)).sum(-1, keepdim=True) * rows
    return y


ROUTINGS = {
    "random": torch.rand(T, X, generator=torch.Generator().manual_seed(0)).topk(K).indices,
    "all on three": torch.tensor([[5, 0, 1]]).expand(T, K).contiguous(),
    "one slot alone": torch.full((T, K), -1).index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(2)),
    "absent both ways": torch.where(
        torch.rand(T, K, generator=torch.Generator().manual_seed(1)) < 0.3,
        torch.tensor([-1, X, X + 5]),
        torch.arange(T * K).view(T, K) % X,
    ),
    "none at all": torch.full((T, K), X),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_of_every_layout_with_adapters(layout: str, routing: str) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        of = {name: tensor.requires_grad_() for name, tensor in mixture(layout, dtype).items()}
        index = ROUTINGS[routing]
        found, wanted = run(of, index, layout), expected(of, index, layout)
        assert relative(found, wanted) <= bound
        grad = random(T, H, seed=9)
        grads = torch.autograd.grad(found, list(of.values()), grad.to(dtype))
        for name, got, want in zip(of, grads, torch.autograd.grad(wanted, list(of.values()), grad), strict=True):
            assert relative(got, want) <= bound or (not want.any() and not got.any()), name
        absent = (index < 0) | (index >= X)
        assert not grads[list(of).index("weights")][absent].any()
        assert not found[absent.all(1)].any()
        assert not grads[list(of).index("x")][absent.all(1)].any()


def check_absent_weights(layout: str) -> None:
    """Of every value that an absent slot's weight may have, outputs and gradients are those of zero."""
    index = ROUTINGS["absent both ways"]
    absent = (index < 0) | (index >= X)
    outcomes = []
    for value in (0.0, float("nan"), float("inf")):
        of = mixture(layout, torch.float64)
        of["weights"] = of["weights"].masked_fill(absent, value)
        of = {name: tensor.requires_grad_() for name, tensor in of.items()}
        y = run(of, index, layout)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(of.values()))])
    for others in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcomes[0], others, strict=True))


def check_fewer_rows(layout: str) -> None:
    """With room for the visits there are, nothing changes; with less, those of the last experts are absent."""
    index = ROUTINGS["absent both ways"]
    experts = torch.where((index >= 0) & (index < X), index, X).flatten()
    visits = int((experts < X).sum())
    for missing in (0, 5):
        kept = index.flatten().clone()
        kept[experts.argsort(stable=True)[visits - missing : visits]] = -1
        of = {name: tensor.requires_grad_() for name, tensor in mixture(layout, torch.float64).items()}
        outcomes = [run(of, index, layout, visits - missing), run(of, kept.view_as(index), layout)]
        grad = random(T, H, seed=9)
        for name, got, want in zip(
            of, *(torch.autograd.grad(y, list(of.values()), grad) for y in outcomes), strict=True
        ):
            assert relative(got, want) <= 1e-12, name
        assert relative(*outcomes) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_for_fewer_rows_than_slots(layout: str) -> None:
    check_fewer_rows(layout)


@pytest.mark.parametrize("biased", [False, True])
def test_routing_weights_are_rounded_once_with_what_they_multiply(biased: bool) -> None:
    """131/128 times 1 + 47/4096 is 132.503/128, so 133/128; with the weight in bfloat16, 129/128, it is 132/128."""
    value, weight = torch.full((1, 8), 131 / 128, dtype=torch.bfloat16), torch.tensor([[1 + 47 / 4096]])
    eye = torch.eye(8, dtype=torch.bfloat16)[None]
    hidden, bias = (torch.zeros_like(value), value) if biased else (value, None)
    y = moe_experts(hidden, torch.tensor([[0]]), weight, ExpertLinear(eye), ExpertLinear(eye, bias), lambda rows: rows)
    assert torch.equal(y, torch.full((1, 8), 133 / 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_absent_slots_may_be_anything(layout: str) -> None:
    check_absent_weights(layout)


@pytest.mark.parametrize("layout", ["gated", "gpt-oss"])
def test_one_graph_for_every_routing(layout: str) -> None:
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    of = {name: tensor.requires_grad_() for name, tensor in mixture(layout, torch.float32).items()}
    for number, index in enumerate(ROUTINGS.values()):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(of, index, layout)
        wanted = expected(of, index, layout)
        assert relative(found, wanted) <= 2e-6
        grads, want = (torch.autograd.grad(y.sum(), list(of.values())) for y in (found, wanted))
        for name, got, one in zip(of, grads, want, strict=True):
            assert relative(got, one) <= 1e-5 or (not one.any() and not got.any()), name


def test_changing_some_tokens_and_their_routing_leaves_the_others_bit_for_bit() -> None:
    of, index = mixture("gpt-oss", torch.float32), ROUTINGS["random"]
    kept = torch.rand(T, generator=torch.Generator().manual_seed(5)) < 0.5

    def outcome(x: Tensor, routed: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = run(of | {"x": x}, routed, "gpt-oss")
        return [t[kept] for t in (y, torch.autograd.grad(y.square().sum(), x)[0])]

    before = outcome(of["x"], index)
    for expert in (0, -1):
        x, routed = of["x"].clone(), index.clone()
        x[~kept], routed[~kept] = float("nan"), torch.tensor([expert, 1, 2])
        for old, new in zip(before, outcome(x, routed), strict=True):
            assert torch.equal(old, new)


def test_a_scale_that_changes_before_a_checkpoint_recomputes_is_an_error() -> None:
    of = problem([5, 0, 12], torch.float32, ranks=(4,))
    factors = [factor.requires_grad_() for factor in of["factors"]]
    scale = [0.5]

    def run(x: Tensor) -> Tensor:
        return _ours(x, of["weight"], of["offsets"], adapters_of(factors, tuple(scale)))

    for changed in (0.5, 1.5):
        scale[0] = 0.5
        y = checkpoint(run, of["x"], use_reentrant=False)
        scale[0] = changed
        if changed == 0.5:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match=r"scale of an adapter was changed.*\[0.5\] to \[1.5\]"):
                y.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_need_no_fixed_place(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, with the reference's products."""
    monkeypatch.setattr(experts, "choose", lambda spec, impl: Choice("triton", "the test's own"))
    monkeypatch.setattr(api, "choose", lambda spec, impl: Choice("triton", "the test's own"))
    monkeypatch.setattr(GroupedMmSpec, "load", lambda impl: reference)
    for index in ROUTINGS.values():
        of = {name: tensor.requires_grad_() for name, tensor in mixture(layout, torch.float64).items()}
        found, wanted = run(of, index, layout), expected(of, index, layout)
        assert relative(found, wanted) <= 1e-12
        grad = random(T, H, seed=9)
        grads = (torch.autograd.grad(y, list(of.values()), grad) for y in (found, wanted))
        for name, got, want in zip(of, *grads, strict=True):
            assert relative(got, want) <= 1e-12 or not (want.any() or got.any()), name
    check_absent_weights(layout)
    check_fewer_rows(layout)
