"""Adapters as part of a base product: against a float64 oracle, gradients, graphs, and what changes before backward."""

# M tokens, K input width, N output width, R rank

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops._lora_linear import op
from deltatune.ops._lora_linear.api import Adapter, linear_with_lora, low_rank

INNER, OUTER, RANKS, SCALES = 24, (72, 16), ((3,), (5, 2)), ((2.0,), (0.5, 3.0))


@dataclass
class Case:
    """Two layers of one input, the second with two adapters, and the parameters behind them."""

    weights: list[Tensor]
    adapters: list[list[Adapter]]

    def run(self, x: Tensor, numbers: tuple[int, ...] = (0, 1)) -> tuple[Tensor, ...]:
        return linear_with_lora(x, [self.weights[i] for i in numbers], [self.adapters[i] for i in numbers])

    def oracle(self, x: Tensor, numbers: tuple[int, ...] = (0, 1)) -> list[Tensor]:
        return [
            F.linear(x.double(), self.weights[i].double())
            + sum(s * F.linear(F.linear(x.double(), a.double()), b.double()) for a, b, s in self.adapters[i])
            for i in numbers
        ]

    def down(self, numbers: tuple[int, ...] = (0, 1)) -> list[Tensor]:
        return [adapter.down for i in numbers for adapter in self.adapters[i]]

    def up(self, numbers: tuple[int, ...] = (0, 1)) -> list[Tensor]:
        return [adapter.up for i in numbers for adapter in self.adapters[i]]


def case(*, dtype=torch.float64, adapter_dtype=None, outers=OUTER, device="cpu") -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float, to=dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, to)

    kept = adapter_dtype or dtype
    adapters = [
        [
            Adapter(
                random(rank, INNER, scale=INNER**-0.5, to=kept).requires_grad_(),
                random(outer, rank, scale=0.2, to=kept).requires_grad_(),
                scale,
            )
            for rank, scale in zip(ranks, scales, strict=True)
        ]
        for outer, ranks, scales in zip(outers, RANKS, SCALES, strict=True)
    ]
    return Case([random(outer, INNER, scale=INNER**-0.5) for outer in outers], adapters)


def inputs(*shape: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, INNER, generator=generator).to(dtype).requires_grad_()


def loss(outputs: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Differs from column to column, so that no two may be exchanged."""
    return torch.stack([(y.double().sin() * torch.arange(1, y.shape[-1] + 1)).sum() for y in outputs]).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1,), (63,), (2, 65), (0,)])
@pytest.mark.parametrize("numbers", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("outers", [OUTER, (64, 65)])  # up to 64 outputs join the narrow product of backward
def test_equals_base_plus_adapters(outers, numbers, shape):
    made, x = case(outers=outers), inputs(*shape)
    found, expected = made.run(x, numbers), made.oracle(x, numbers)
    for y, want in zip(found, expected, strict=True):
        assert y.shape == want.shape
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    leaves = [x, *made.down(numbers), *made.up(numbers)]
    grads = torch.autograd.grad(loss(found), leaves)
    for grad, want in zip(grads, torch.autograd.grad(loss(expected), leaves), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", ["input", "down", "up", "adapters", "input and down", "input and up"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen):
    made, x = case(), inputs(9)
    parts = {"input": [x], "down": made.down(), "up": made.up(), "adapters": [*made.down(), *made.up()]}
    every = (x, *made.down(), *made.up())
    with FlopCounterMode(display=False) as counter:
        loss(made.run(x)).backward()
    everything = counter.get_total_flops()
    expected = {id(leaf): leaf.grad.clone() for leaf in every}
    for leaf in every:
        leaf.grad = None
    for leaf in [leaf for part in frozen.split(" and ") for leaf in parts[part]]:
        leaf.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss(made.run(x)).backward()
    assert counter.get_total_flops() < everything
    for leaf in every:
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[id(leaf)], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


def test_strided_inputs_and_gradients():
    made = case()
    wide = torch.randn(2 * INNER, 2, 7, dtype=torch.float64)
    x = wide.permute(2, 1, 0)[..., ::2].requires_grad_()
    found, expected = made.run(x), made.oracle(x)
    grads = [torch.randn(y.shape[::-1], dtype=torch.float64).permute(2, 1, 0) for y in found]
    (got,) = torch.autograd.grad(found, x, grads)
    (want,) = torch.autograd.grad(expected, x, grads)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def assert_at_most_twice_the_error_of_separate_products(made: Case, x: Tensor) -> None:
    """Against float64 on the same numbers; the measure is PEFT's formula in the 16-bit dtype throughout."""
    dtype, leaves = x.dtype, [x, *made.down(), *made.up()]
    exact = made.oracle(x)
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x) for y in exact]
    want = [*exact, *torch.autograd.grad(exact, leaves, [w.double() for w in weights])]
    outputs = []
    for weight, adapters in zip(made.weights, made.adapters, strict=True):
        y = F.linear(x, weight)
        for a, b, scale in adapters:
            y = y + F.linear(F.linear(x, a.to(dtype)), b.to(dtype)) * scale
        outputs.append(y)
    separate = [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
    fused = list(made.run(x))
    fused += torch.autograd.grad(fused, leaves, weights)
    for found, theirs, expected in zip(fused, separate, want, strict=True):
        assert found.dtype == theirs.dtype
        assert relative(found, expected) <= 2 * relative(theirs, expected)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_separate_products(dtype, adapter_dtype):
    made = case(dtype=dtype, adapter_dtype=adapter_dtype)
    assert_at_most_twice_the_error_of_separate_products(made, inputs(300, dtype=dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_wide_layers_on_a_gpu(dtype):
    made = case(dtype=dtype, adapter_dtype=torch.float32, outers=(2048, 6144), device="cuda")
    x = inputs(5500, dtype=dtype).detach().to("cuda").requires_grad_()
    assert_at_most_twice_the_error_of_separate_products(made, x)


def test_one_graph_whatever_the_values():
    made = case(dtype=torch.float32)
    leaves = (*made.down(), *made.up())

    def block(x: Tensor) -> Tensor:
        gate, up = made.run(torch.tanh(x))
        return gate[..., :16] * up

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x = inputs(2, 9, dtype=torch.float32)
            found = torch.autograd.grad(compiled(x).square().sum(), (x, *leaves))
            want = torch.autograd.grad(block(x).square().sum(), (x, *leaves))
            for got, expected in zip(found, want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                for adapter in leaves:
                    adapter.mul_(1.0 + step)


def test_scales_that_change_are_compiled_twice_at_most():
    made = case(dtype=torch.float32)
    scales = {"now": 1.0}

    def block(x: Tensor) -> Tensor:
        adapters = [adapter._replace(scale=scales["now"]) for adapter in made.adapters[1]]
        return linear_with_lora(x.sin(), made.weights[1:], [adapters])[0]

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    seen = []
    for scale in (1.0, 0.5, 3.0, 0.25):
        scales["now"] = scale
        x = inputs(7, dtype=torch.float32)
        leaves = (x, *made.down((1,)), *made.up((1,)))
        found = torch.autograd.grad(compiled(x).square().sum(), leaves)
        want = torch.autograd.grad(block(x).square().sum(), leaves)
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[1]


def test_recomputation_changes_nothing():
    made, x = case(), inputs(9)
    leaves = [x, *made.down(), *made.up()]
    want = torch.autograd.grad(loss(made.run(x)), leaves)
    found = torch.autograd.grad(loss(checkpoint(made.run, x, use_reentrant=False)), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def test_a_second_derivative_is_refused():
    made, x = case(), inputs(3)
    (grad,) = torch.autograd.grad(loss(made.run(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_with_lora has no second derivative"):
        grad.sum().backward()


def test_a_second_derivative_behind_a_plain_sum_is_refused_too():
    """The gradient that comes in is a constant there; those of A and B depend on x and on each other all the same."""
    made, x = case(), inputs(3)
    down, up = made.down()[0], made.up()[0]
    (grad,) = torch.autograd.grad(sum(y.sum() for y in made.run(x)), down, create_graph=True)
    for source in (x, up):
        with pytest.raises(RuntimeError, match="linear_with_lora has no second derivative"):
            torch.autograd.grad(grad.square().sum() + source.square().sum(), source, retain_graph=True)


def test_autocast_rounds_nothing_inside():
    made, x = case(dtype=torch.bfloat16, adapter_dtype=torch.float32), inputs(9, dtype=torch.bfloat16)
    leaves = (x, *made.down())
    want = torch.autograd.grad(loss(made.run(x)), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss(made.run(x)), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def _parameters(made: Case) -> Iterator[Tensor]:
    yield from made.weights
    yield from made.down()
    yield from made.up()


@pytest.mark.parametrize("number", range(8))
def test_what_was_written_to_before_backward_is_refused_as_torch_does(number: int):
    made, x = case(), inputs(4)
    waiting = loss(made.run(x))
    with torch.no_grad():
        list(_parameters(made))[number].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


@pytest.mark.parametrize("number", range(8))
def test_storage_that_is_exchanged_before_backward_is_not_read(number: int):
    made, x = case(), inputs(4)
    leaves = [x, *made.down(), *made.up()]
    want = torch.autograd.grad(loss(made.oracle(x)), leaves)
    waiting = loss(made.run(x))
    parameter = list(_parameters(made))[number]
    parameter.data = torch.randn_like(parameter)
    for got, expected in zip(torch.autograd.grad(waiting, leaves), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_values_of_the_call_count_and_not_those_of_later_ones():
    made, x = case(), inputs(4)
    leaves = [x, *made.down(), *made.up()]
    want = torch.autograd.grad(loss(made.oracle(x)), leaves)
    waiting = loss(made.run(x))
    other = Case(
        [weight * 2 for weight in made.weights],
        [[Adapter(a * 2, b * 2, 9.0) for a, b, _ in adapters] for adapters in made.adapters],
    )
    loss(other.run(x))
    for got, expected in zip(torch.autograd.grad(waiting, leaves), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    m, k, w = 5, 12, 8
    x = torch.randn(m, k).to(dtype)
    ops: dict[Callable[..., Any], tuple[Any, ...]] = {
        torch.ops.deltatune.lora_accumulate.default: (
            torch.randn(m, w).to(dtype), torch.randn(w, 20).to(dtype), [x], [torch.randn(20, k).to(dtype).mT],
        ),
        torch.ops.deltatune.lora_sum_products.default: (torch.randn(m, w).to(dtype), x[:, 1:]),
    }  # fmt: skip
    for function, arguments in ops.items():
        torch.library.opcheck(function, arguments)


def test_sums_of_products_stay_wide():
    left, right = torch.full((4096, 2), 1.0, dtype=torch.bfloat16), torch.full((4096, 3), 1 / 256, dtype=torch.bfloat16)
    found = op.lora_sum_products(left, right)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, 3), 16.0))


@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32])
def test_low_rank_equals_its_formula(adapter_dtype):
    adapter = case(adapter_dtype=adapter_dtype).adapters[0][0]._replace(scale=1.5)
    x, (a, b, _) = inputs(2, 7), adapter
    y = low_rank(x, adapter)
    want = 1.5 * F.linear(F.linear(x, a.double()), b.double())
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for got, expected in zip(
        torch.autograd.grad(loss([y]), (x, a, b)), torch.autograd.grad(loss([want]), (x, a, b)), strict=True
    ):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_that_changes_before_a_checkpoint_recomputes_is_an_error() -> None:
    weight, x = torch.randn(40, 24), torch.randn(7, 24, requires_grad=True)
    down, up, scale = torch.randn(4, 24, requires_grad=True), torch.randn(40, 4, requires_grad=True), [0.5]

    def run(x: torch.Tensor) -> torch.Tensor:
        return linear_with_lora(x, [weight], [[Adapter(down, up, scale[0])]])[0]

    checkpoint(run, x, use_reentrant=False).sum().backward()
    y = checkpoint(run, x, use_reentrant=False)
    scale[0] = 1.5
    with pytest.raises(RuntimeError, match=r"scale of an adapter was changed.*\[0.5\] to \[1.5\]"):
        y.sum().backward()
