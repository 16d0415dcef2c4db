"""The layer behind a gated activation: its op, the kernel in Triton's interpreter and on a GPU, all gradients."""

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
from torch.utils.flop_counter import FlopCounterMode

from deltatune.lora.group import empty_operands, take_in_all
from deltatune.ops._lora_linear.gated import gated_linear_with_lora
from deltatune.ops._lora_linear.gated_act import gated_act, gated_act_runs
from deltatune.ops._lora_linear.layout import Layout, Operands, Slot, Target
from deltatune.ops._lora_linear.refresh import Refresh

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, set by test_in_the_interpreter")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INNER, OUTER, RANKS, SCALES = 72, 24, (3, 5), (0.5, 3.0)


@dataclass
class Case:
    """One layer with two adapters, and what the op takes for it."""

    layout: Layout
    operands: Operands
    weight: Tensor
    down: list[Tensor]
    up: list[Tensor]

    def run(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated_linear_with_lora(gate, up, self.operands, self.layout, (self.down, self.up))

    def plain(self, gate: Tensor, up: Tensor) -> Tensor:
        """The formula, in the dtype of gate and up."""
        h = F.silu(gate) * up
        y = F.linear(h, self.weight.to(h.dtype))
        for a, b, scale in zip(self.down, self.up, SCALES[: len(self.down)], strict=True):
            y = y + scale * F.linear(F.linear(h, a.to(h.dtype)), b.to(h.dtype))
        return y


def case(
    backward_border: bool = True, *, dtype=torch.float64, device="cpu", inner=INNER, outer=OUTER, ranks=RANKS
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    slots = tuple(Slot(0, sum(ranks[:number]), rank) for number, rank in enumerate(ranks))
    layout = Layout(inner, 64, True, backward_border, (Target(outer, 0, 64),), slots)
    weight = random(outer, inner, scale=inner**-0.5)
    down = [random(rank, inner, scale=inner**-0.5).requires_grad_() for rank in ranks]
    up = [random(outer, rank, scale=0.2).requires_grad_() for rank in ranks]
    operands = empty_operands(layout, take_in_all(layout, [torch.nn.Parameter(weight.clone(), requires_grad=False)]))
    Refresh(layout, operands).run(down, up, SCALES[: len(ranks)])
    return Case(layout, operands, weight, down, up)


def inputs(*shape: int, dtype=torch.float64, device="cpu", inner=INNER) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = torch.randn(2, *shape, inner, generator=generator).to(device, dtype)
    return gate.requires_grad_(), up.requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def weighted(y: Tensor) -> Tensor:
    """Differs from column to column, so that no two may be exchanged."""
    return (y.double().sin() * torch.arange(1, y.shape[-1] + 1, device=y.device)).sum()


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_op_extends_the_activation_by_its_narrow_product(tokens):
    gate, up = (x.detach() for x in inputs(tokens))
    down = torch.randn(INNER, 48, dtype=torch.float64)
    down[:, 20:] = 0
    extended = gated_act(gate, up, down, 20)
    h = F.silu(gate) * up
    torch.testing.assert_close(extended[:, :INNER], h)
    torch.testing.assert_close(extended[:, INNER:], h @ down)


def test_op_takes_rows_of_larger_matrices():
    wide = torch.randn(9, 3 * INNER, dtype=torch.float64)
    gate, up, down = wide[:, :INNER], wide[:, 2 * INNER :], torch.randn(16, INNER, dtype=torch.float64).mT
    assert torch.equal(gated_act(gate, up, down, 16), gated_act(gate.clone(), up.clone(), down.contiguous(), 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    gate, up = (x.detach() for x in inputs(9, dtype=dtype))
    torch.library.opcheck(torch.ops.deltatune.lora_gated_act.default, (gate, up, torch.ones(INNER, 32).to(dtype), 16))


def test_op_counts_its_product_and_ignores_autocast():
    gate, up = (x.detach() for x in inputs(9, dtype=torch.float32))
    down = torch.randn(INNER, 32)
    with FlopCounterMode(display=False) as counter:
        want = gated_act(gate, up, down, 16)
    assert counter.get_total_flops() == 2 * 9 * INNER * 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_act(gate, up, down, 16), want)


@pytest.mark.parametrize(
    ("device", "dtype", "runs"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_where_the_kernel_runs(device, dtype, runs):
    pytest.importorskip("triton")
    assert gated_act_runs(torch.device(device), dtype) == runs


@pytest.mark.parametrize("backward_border", [False, True])
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 65), (0,)])
def test_equals_base_plus_adapters_of_the_activation(shape, backward_border):
    made, (gate, up) = case(backward_border), inputs(*shape)
    found, want = made.run(gate, up), made.plain(gate, up)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    leaves = [gate, up, *made.down, *made.up]
    grads = torch.autograd.grad(weighted(found), leaves)
    for grad, expected in zip(grads, torch.autograd.grad(weighted(want), leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", ["inputs", "down", "up", "adapters"])
def test_what_is_frozen_gets_no_gradient(frozen):
    made, (gate, up) = case(), inputs(9)
    leaves = [gate, up, *made.down, *made.up]
    parts = {"inputs": [gate, up], "down": made.down, "up": made.up, "adapters": [*made.down, *made.up]}
    expected = torch.autograd.grad(weighted(made.run(gate, up)), leaves)
    for leaf in parts[frozen]:
        leaf.requires_grad_(False)
    weighted(made.run(gate, up)).backward()
    for leaf, want in zip(leaves, expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


def test_keeps_gate_up_and_the_extended_activation() -> None:
    made, (gate, up) = case(), inputs(9)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        made.run(gate, up)
    assert [tuple(x.shape) for x in saved if x.shape[0] == 9] == [(9, INNER), (9, INNER), (9, INNER + 64)]


@pytest.mark.parametrize("ranks", [(3,), (3, 5)])
def test_compiles_as_one_graph(ranks):
    made, (gate, up) = case(dtype=torch.float32, ranks=ranks), inputs(2, 20, dtype=torch.float32)
    leaves = [gate, up, *made.down, *made.up]
    want = torch.autograd.grad(weighted(made.run(gate, up)), leaves)
    compiled = torch.compile(lambda *both: made.run(*both), fullgraph=True, dynamic=False)
    found = compiled(gate, up)
    torch.testing.assert_close(found, made.run(gate, up), rtol=1e-5, atol=1e-5)
    for grad, expected in zip(torch.autograd.grad(weighted(found), leaves), want, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(gate, up), found, rtol=1e-5, atol=1e-5)


def assert_at_most_twice_the_error_of_plain_torch(made: Case, gate: Tensor, up: Tensor) -> None:
    leaves = [gate, up, *made.down, *made.up]

    def everything(y: Tensor) -> list[Tensor]:
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, leaves, weight)]

    exact = everything(made.plain(gate.double(), up.double()))
    plain, found = everything(made.plain(gate, up)), everything(made.run(gate, up))
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, want) <= 2 * relative(theirs, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    assert_at_most_twice_the_error_of_plain_torch(case(dtype=dtype), *inputs(300, dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    """Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout, done.stdout


@interpreted
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(("tokens", "inner", "border"), [(33, 208, 64), (1, 64, 32), (31, 16, 192), (0, 16, 64)])
def test_interpreted_kernel(tokens, inner, border, width):
    from deltatune.ops._lora_linear.gated_act_kernel import Tile, write_extended

    generator = torch.Generator().manual_seed(tokens)
    gate, up = torch.randn(2, tokens, inner + 8, generator=generator).half()[..., 8:]
    down = (torch.randn(inner, width + 16, generator=generator) / inner**0.5).half()[:, 16:]
    extended = torch.full((tokens, inner + border), float("nan"), dtype=torch.float16)
    write_extended(gate, up, down, extended, Tile(16, 64, 4))
    h = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(extended[:, :inner].double(), h, rtol=2**-10, atol=1e-7)
    product = extended[:, :inner].double() @ down.double()
    torch.testing.assert_close(extended[:, inner : inner + width].double(), product, rtol=2**-10, atol=1e-6)
    assert not extended[:, inner + width :].any()


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(("tokens", "inner"), [(16384, 6144), (5501, 1552), (1, 12288)])
def test_kernel_is_as_exact_as_plain_torch_and_repeats_its_bits(tokens, inner, width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    gate, up = torch.randn(2, tokens, inner, generator=generator, device="cuda").to(dtype)
    down = torch.zeros(inner, 64, device="cuda", dtype=dtype)
    down[:, :width] = torch.randn(inner, width, generator=generator, device="cuda") / inner**0.5
    found, again = gated_act(gate, up, down, width), gated_act(gate, up, down, width)
    assert torch.equal(found, again)
    assert not found[:, inner + width :].any()
    exact = F.silu(gate.double()) * up.double()
    plain = F.silu(gate) * up
    assert relative(found[:, :inner], exact) <= relative(plain, exact)
    narrow = found[:, inner : inner + width]
    assert relative(narrow, exact @ down[:, :width].double()) <= relative(
        plain @ down[:, :width], exact @ down[:, :width].double()
    )


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_on_a_gpu_is_at_most_twice_that_of_plain_torch(dtype):
    made = case(dtype=dtype, device="cuda", inner=1536, outer=512)
    both = inputs(3000, dtype=dtype, device="cuda", inner=1536)
    assert_at_most_twice_the_error_of_plain_torch(made, *both)
