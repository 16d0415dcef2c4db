"""Adapters inside a base product: every layout against a float64 oracle, gradients, graphs, the operands' refresh."""

# M tokens, K input width, N output width, W border width, R rank

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops._lora_linear import op
from deltatune.ops._lora_linear.api import linear_with_lora
from deltatune.ops._lora_linear.layout import Layout, Operands, Slot, Target
from deltatune.ops._lora_linear.low_rank import low_rank
from deltatune.ops._lora_linear.refresh import Refresh

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BORDERS = [(forward, backward) for forward in (False, True) for backward in (False, True)]
INNER, OUTER, RANKS, SCALES = 24, (72, 16), ((3,), (5, 2)), ((2.0,), (0.5, 3.0))


@dataclass
class Case:
    """Two layers of one input, the second with two adapters, and what the op takes for them."""

    layout: Layout
    operands: Operands
    weights: list[Tensor]
    down: list[Tensor]
    up: list[Tensor]
    scales: list[float]

    def run(self, x: Tensor, numbers: tuple[int, ...] = (0, 1)) -> tuple[Tensor, ...]:
        slots = [i for i, slot in enumerate(self.layout.slots) if slot.target in numbers]
        down, up = [self.down[i] for i in slots], [self.up[i] for i in slots]
        return linear_with_lora(x, self.operands, self.layout, down, up, numbers=numbers)

    def oracle(self, x: Tensor, numbers: tuple[int, ...] = (0, 1)) -> list[Tensor]:
        outputs = []
        for number in numbers:
            y = F.linear(x.double(), self.weights[number].double())
            for slot, a, b, scale in zip(self.layout.slots, self.down, self.up, self.scales, strict=True):
                if slot.target == number:
                    y = y + scale * F.linear(F.linear(x.double(), a.double()), b.double())
            outputs.append(y)
        return outputs

    def refresh(self) -> None:
        Refresh(self.layout, self.operands).run(self.down, self.up, self.scales)


def case(
    forward: bool = True, backward: bool = True, *, dtype=torch.float64, adapter_dtype=None, outers=OUTER, device="cpu"
) -> Case:
    generator = torch.Generator().manual_seed(0)
    targets, slots, place, width = [], [], 0, 48
    for number, (outer, ranks) in enumerate(zip(outers, RANKS, strict=True)):
        first = place
        for rank in ranks:
            slots.append(Slot(number, place, rank))
            place += rank
        place = -(-place // 16) * 16
        targets.append(Target(outer, first, place - first))
    layout = Layout(INNER, width, forward, backward, tuple(targets), tuple(slots))

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    weights = [random(outer, INNER, scale=INNER**-0.5) for outer in outers]
    adapter = adapter_dtype or dtype
    down = [random(slot.rank, INNER, scale=INNER**-0.5).to(adapter).requires_grad_() for slot in slots]
    up = [random(outers[slot.target], slot.rank, scale=0.2).to(adapter).requires_grad_() for slot in slots]
    bordered, ups = [], []
    for weight, target in zip(weights, targets, strict=True):
        buffer = torch.zeros(
            target.outer + backward * target.width, INNER + forward * width, dtype=dtype, device=device
        )
        buffer[: target.outer, :INNER] = weight
        first = INNER + target.offset
        columns = buffer[: target.outer, first : first + target.width]
        bordered.append(buffer)
        ups.append(columns if forward else torch.zeros(target.outer, target.width, dtype=dtype, device=device))
    operands = Operands(
        torch.zeros(INNER, width, dtype=dtype, device=device),
        torch.zeros(width, INNER, dtype=dtype, device=device),
        torch.zeros(width, device=device),
        tuple(bordered),
        tuple(ups),
    )
    made = Case(layout, operands, weights, down, up, [scale for scales in SCALES for scale in scales])
    made.refresh()
    return made


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
@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_equals_base_plus_adapters(forward, backward, numbers, shape):
    made, x = case(forward, backward), inputs(*shape)
    found, expected = made.run(x, numbers), made.oracle(x, numbers)
    for y, want in zip(found, expected, strict=True):
        assert y.shape == want.shape
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    slots = [i for i, slot in enumerate(made.layout.slots) if slot.target in numbers]
    leaves = [x, *(made.down[i] for i in slots), *(made.up[i] for i in slots)]
    grads = torch.autograd.grad(loss(found), leaves)
    for grad, want in zip(grads, torch.autograd.grad(loss(expected), leaves), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", ["input", "down", "up", "adapters"])
@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_what_is_frozen_gets_no_gradient_and_costs_none(forward, backward, frozen):
    made, x = case(forward, backward), inputs(9)
    parts = {"input": [x], "down": made.down, "up": made.up, "adapters": [*made.down, *made.up]}
    with FlopCounterMode(display=False) as counter:
        loss(made.run(x)).backward()
    everything = counter.get_total_flops()
    expected = {id(leaf): leaf.grad.clone() for leaf in (x, *made.down, *made.up)}
    for leaf in (x, *made.down, *made.up):
        leaf.grad = None
    for leaf in parts[frozen]:
        leaf.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss(made.run(x)).backward()
    assert counter.get_total_flops() < everything
    for leaf in (x, *made.down, *made.up):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[id(leaf)], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_strided_inputs_and_gradients(forward, backward):
    made = case(forward, backward)
    wide = torch.randn(2 * INNER, 2, 7, dtype=torch.float64)
    x = wide.permute(2, 1, 0)[..., ::2].requires_grad_()
    found, expected = made.run(x), made.oracle(x)
    grads = [torch.randn(y.shape[::-1], dtype=torch.float64).permute(2, 1, 0) for y in found]
    (got,) = torch.autograd.grad(found, x, grads)
    (want,) = torch.autograd.grad(expected, x, grads)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def assert_at_most_twice_the_error_of_separate_products(made: Case, x: Tensor) -> None:
    """Against float64 on the same numbers; the measure is PEFT's formula in the 16-bit dtype throughout."""
    dtype, leaves = x.dtype, [x, *made.down, *made.up]
    exact = made.oracle(x)
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x) for y in exact]
    want = [*exact, *torch.autograd.grad(exact, leaves, [w.double() for w in weights])]
    outputs = []
    for number, weight in enumerate(made.weights):
        y = F.linear(x, weight)
        for slot, a, b, scale in zip(made.layout.slots, made.down, made.up, made.scales, strict=True):
            if slot.target == number:
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
@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_error_is_at_most_twice_that_of_separate_products(forward, backward, dtype, adapter_dtype):
    made = case(forward, backward, dtype=dtype, adapter_dtype=adapter_dtype)
    assert_at_most_twice_the_error_of_separate_products(made, inputs(300, dtype=dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_error_of_wide_layers_on_a_gpu(forward, backward, dtype):
    made = case(forward, backward, dtype=dtype, adapter_dtype=torch.float32, outers=(2048, 6144), device="cuda")
    x = inputs(5500, dtype=dtype).detach().to("cuda").requires_grad_()
    assert_at_most_twice_the_error_of_separate_products(made, x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_one_graph_whatever_the_values(forward, backward, backend):
    made = case(forward, backward, dtype=torch.float32)

    def block(x: Tensor) -> Tensor:
        gate, up = made.run(torch.tanh(x))
        return gate[..., :16] * up

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x = inputs(2, 9, dtype=torch.float32)
            found = torch.autograd.grad(compiled(x).square().sum(), (x, *made.down, *made.up))
            want = torch.autograd.grad(block(x).square().sum(), (x, *made.down, *made.up))
            for got, expected in zip(found, want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                for adapter in (*made.down, *made.up):
                    adapter.mul_(1.0 + step)
            made.refresh()


@pytest.mark.parametrize(("forward", "backward"), BORDERS)
def test_recomputation_changes_nothing(forward, backward):
    made, x = case(forward, backward), inputs(9)
    leaves = [x, *made.down, *made.up]
    want = torch.autograd.grad(loss(made.run(x)), leaves)
    found = torch.autograd.grad(loss(checkpoint(made.run, x, use_reentrant=False)), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def test_a_second_derivative_is_refused():
    made, x = case(), inputs(3)
    (grad,) = torch.autograd.grad(loss(made.run(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_rounds_nothing_inside():
    made, x = case(dtype=torch.bfloat16, adapter_dtype=torch.float32), inputs(9, dtype=torch.bfloat16)
    want = torch.autograd.grad(loss(made.run(x)), (x, *made.down))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss(made.run(x)), (x, *made.down))
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    m, k, w = 5, 12, 8
    extended, weight = torch.randn(m, k + w).to(dtype), torch.randn(k, w).to(dtype)
    torch.library.opcheck(torch.ops.deltatune.lora_fill_border.default, (extended, weight))
    narrow, up = torch.randn(m, w).to(dtype), torch.randn(w, 20).to(dtype)
    wide = ([torch.randn(m, k).to(dtype)], [torch.randn(20, k).to(dtype).mT])
    torch.library.opcheck(torch.ops.deltatune.lora_accumulate.default, (narrow, up, *wide))
    torch.library.opcheck(torch.ops.deltatune.lora_sum_products.default, (narrow, extended[:, 1:]))


def test_sums_of_products_stay_wide():
    left, right = torch.full((4096, 2), 1.0, dtype=torch.bfloat16), torch.full((4096, 3), 1 / 256, dtype=torch.bfloat16)
    found = op.sum_products(left, right)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, 3), 16.0))


@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32])
def test_low_rank_equals_its_formula(adapter_dtype):
    made = case(adapter_dtype=adapter_dtype)
    x, a, b = inputs(2, 7), made.down[0], made.up[0]
    y = low_rank(x, a, b, 1.5)
    want = 1.5 * F.linear(F.linear(x, a.double()), b.double())
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for got, expected in zip(
        torch.autograd.grad(loss([y]), (x, a, b)), torch.autograd.grad(loss([want]), (x, a, b)), strict=True
    ):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_refreshing_with_the_same_values_leaves_a_backward_valid():
    made, x = case(), inputs(4)
    keeper = Refresh(made.layout, made.operands)
    keeper.run(made.down, made.up, made.scales)
    waiting = loss(made.run(x))
    keeper.run(made.down, made.up, made.scales)
    waiting.backward()
    assert x.grad is not None


def test_refreshing_with_other_values_refuses_a_backward_of_before():
    made, x = case(), inputs(4)
    keeper = Refresh(made.layout, made.operands)
    keeper.run(made.down, made.up, made.scales)
    waiting = loss(made.run(x))
    with torch.no_grad():
        made.up[0].add_(1)
    keeper.run(made.down, made.up, made.scales)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


@pytest.mark.skipif(INTERPRETED, reason="runs the other test of copies, in an interpreter")
def test_copies_in_the_interpreter():
    """Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_copies"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set by test_copies_in_the_interpreter")
@pytest.mark.parametrize("target", [torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float16, torch.float32])
def test_copies(source, target):
    from deltatune.ops._lora_linear.copies import Copies

    a, b = torch.randn(3, 1500).to(source), torch.randn(40, 3).to(source)
    buffer, down = torch.zeros(50, 1600, dtype=target), torch.zeros(1500, 8, dtype=target)
    copies = Copies()
    for _ in range(2):
        copies.run([(a, buffer[40:43, :1500], 1.0), (a, down[:, 2:5].mT, 1.0), (b, buffer[:40, 1500:1503], 0.5)])
        assert torch.equal(buffer[40:43, :1500], a.to(target))
        assert torch.equal(down[:, 2:5], a.to(target).T)
        assert torch.equal(buffer[:40, 1500:1503], (0.5 * b.float()).to(target))
        assert not buffer[43:].any()
        assert not down[:, 5:].any()
        a, b = a + 1, b * 2
