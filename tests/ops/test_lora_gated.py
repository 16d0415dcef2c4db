"""A gated activation of layers with adapters: both ways against a float64 oracle, gradients, graphs, errors."""

# M tokens, K input width, N outputs of gate and of up, R rank

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops import Adapter, LoraGatedSpec, choose, lora_gated
from deltatune.ops._lora_gated import providers, reference, sums
from deltatune.ops._lora_gated.op import lora_gated_activation, lora_gated_activation_backward

INNER, OUTER, RANKS, SCALES = 24, 40, ((3,), (5, 20)), ((2.0,), (0.5, 3.0))
#: both ways to compute the op; without a GPU the second adds its sums in plain torch, all around it is the same
WAYS = {"reference": reference.lora_gated, "sums": sums.lora_gated}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CUDA = torch.device("cuda")
ways = pytest.mark.parametrize("way", WAYS)


@dataclass
class Case:
    """Both layers, the second with two adapters, and the input."""

    x: Tensor
    weights: list[Tensor]
    adapters: list[list[Adapter]]

    @property
    def leaves(self) -> list[Tensor]:
        """What trains: the input, A and B of every adapter."""
        return [self.x, *(factor for of in self.adapters for adapter in of for factor in (adapter.down, adapter.up))]

    def run(self, way: str, activation: str = "silu") -> Tensor:
        return WAYS[way](self.x, self.weights, self.adapters, activation)

    def plain(self, dtype: torch.dtype, activation: str = "silu") -> Tensor:
        """The formula in one dtype, as PEFT's layers would compute it."""
        gate, up = (
            F.linear(self.x.to(dtype), weight.to(dtype))
            + sum(s * F.linear(F.linear(self.x.to(dtype), a.to(dtype)), b.to(dtype)) for a, b, s in of)
            for weight, of in zip(self.weights, self.adapters, strict=True)
        )
        return ACTIVATIONS[activation](gate) * up


def case(*shape: int, dtype=torch.float64, adapter_dtype=None, ranks=RANKS) -> Case:
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes: int, scale: float, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(to)

    kept = adapter_dtype or dtype
    adapters = [
        [
            Adapter(
                random(rank, INNER, scale=INNER**-0.5, to=kept).requires_grad_(),
                random(OUTER, rank, scale=0.2, to=kept).requires_grad_(),
                scale,
            )
            for rank, scale in zip(ranks_of_layer, scales, strict=True)
        ]
        for ranks_of_layer, scales in zip(ranks, SCALES, strict=True)
    ]
    weights = [random(OUTER, INNER, scale=INNER**-0.5) for _ in range(2)]
    return Case(random(*shape, INNER, scale=1.0).requires_grad_(), weights, adapters)


def weighted(h: Tensor) -> Tensor:
    """Differs from column to column, so that no two may be exchanged."""
    return (h.double().sin() * torch.arange(1, h.shape[-1] + 1)).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 65), (0,)])
def test_equals_its_formula(shape, activation, way):
    made = case(*shape)
    found, want = made.run(way, activation), made.plain(torch.float64, activation)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(weighted(found), made.leaves)
    for grad, expected in zip(grads, torch.autograd.grad(weighted(want), made.leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, way):
    made = case(2, ranks=((2,), (1, 3)))

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        (a, b, a1, b1, a2, b2), scales = factors, SCALES
        adapters = [[Adapter(a, b, scales[0][0])], [Adapter(a1, b1, scales[1][0]), Adapter(a2, b2, scales[1][1])]]
        return WAYS[way](x, made.weights, adapters, activation)

    assert torch.autograd.gradcheck(run, made.leaves)


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_that_of_separate_products(activation, dtype, way):
    made = case(300, dtype=dtype, adapter_dtype=torch.float32)
    grad = torch.randn(300, OUTER, generator=torch.Generator().manual_seed(1)).to(dtype)

    def everything(h: Tensor) -> list[Tensor]:
        return [h, *torch.autograd.grad(h, made.leaves, grad.to(h.dtype))]

    exact, plain = (everything(made.plain(precision, activation)) for precision in (torch.float64, dtype))
    for found, theirs, want in zip(everything(made.run(way, activation)), plain, exact, strict=True):
        assert found.dtype == theirs.dtype
        assert relative(found, want.double()) <= 2 * relative(theirs, want.double())


@ways
@pytest.mark.parametrize("frozen", ["input", "factors of gate", "factors of up", "all factors"])
def test_what_is_frozen_gets_no_gradient(frozen, way):
    made = case(9)
    leaves = made.leaves
    want = torch.autograd.grad(weighted(made.run(way)), leaves)
    places = {"input": [0], "factors of gate": [1, 2], "factors of up": [3, 4, 5, 6], "all factors": range(1, 7)}
    for place in places[frozen]:
        leaves[place].requires_grad_(False)
    weighted(made.run(way)).backward()
    for place, (leaf, expected) in enumerate(zip(leaves, want, strict=True)):
        if place in places[frozen]:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


def test_sums_save_base_products_in_place_of_gate_and_up():
    made, kept = case(9), dict[str, list[tuple[int, ...]]]()
    for way in WAYS:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            made.run(way)
        kept[way] = sorted(tuple(x.shape) for x in saved if x.shape[:1] == (9,))
    assert kept["sums"] == [(9, INNER), (9, OUTER), (9, OUTER), (9, 16 + 32)]
    assert kept["sums"].count((9, OUTER)) < kept["reference"].count((9, OUTER))


@ways
def test_one_graph_whatever_the_values(way):
    made = case(2, 9, dtype=torch.float32)

    def block(x: Tensor) -> Tensor:
        return WAYS[way](torch.tanh(x), made.weights, made.adapters, "silu").square()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            found = torch.autograd.grad(compiled(made.x).sum(), made.leaves)
            want = torch.autograd.grad(block(made.x).sum(), made.leaves)
            for got, expected in zip(found, want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                for leaf in made.leaves:
                    leaf.mul_(1.0 + step)
    with torch.no_grad():
        torch.testing.assert_close(compiled(made.x), block(made.x), rtol=1e-5, atol=1e-5)


@ways
def test_recomputation_changes_nothing(way):
    made = case(9)
    want = torch.autograd.grad(weighted(made.run(way)), made.leaves)
    recomputed = checkpoint(lambda x: WAYS[way](x, made.weights, made.adapters, "silu"), made.x, use_reentrant=False)
    found = torch.autograd.grad(weighted(recomputed), made.leaves)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


@ways
def test_a_second_derivative_is_refused(way):
    made = case(3)
    (grad,) = torch.autograd.grad(weighted(made.run(way)), made.x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@ways
@pytest.mark.parametrize("number", range(8))
def test_what_was_written_to_before_backward_is_refused(number, way):
    made = case(4)
    waiting = weighted(made.run(way))
    with torch.no_grad():
        [*made.weights, *made.leaves[1:]][number].mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.backward()


def test_a_scale_that_changes_before_a_checkpoint_recomputes_is_an_error():
    made, scale = case(7), [0.5]

    def run(x: Tensor) -> Tensor:
        adapters = [[adapter._replace(scale=scale[0]) for adapter in of] for of in made.adapters]
        return sums.lora_gated(x, made.weights, adapters, "silu")

    h = checkpoint(run, made.x, use_reentrant=False)
    scale[0] = 1.5
    with pytest.raises(RuntimeError, match=r"lora_gated: the scale of an adapter was changed.*\[0.5, 0.5, 0.5\]"):
        h.sum().backward()


@ways
def test_strided_inputs_and_gradients(way):
    made = case(1)
    made.x = torch.randn(2 * INNER, 2, 7, dtype=torch.float64).permute(2, 1, 0)[..., ::2].requires_grad_()
    grad = torch.randn(OUTER, 2, 7, dtype=torch.float64).permute(2, 1, 0)
    found = torch.autograd.grad(made.run(way), made.leaves, grad)
    want = torch.autograd.grad(made.plain(torch.float64), made.leaves, grad)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@ways
def test_autocast_rounds_nothing_inside(way):
    made = case(9, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    want = torch.autograd.grad(weighted(made.run(way)), made.leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(weighted(made.run(way)), made.leaves)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))


def operands(m: int, n: int, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """G, U, u, B of gate and B of up."""
    generator = torch.Generator().manual_seed(m + n)
    shapes = (m, n), (m, n), (m, sum(widths)), (n, widths[0]), (n, widths[1])
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, activation):
    given = operands(5, 12, (16, 32), dtype)
    torch.library.opcheck(torch.ops.deltatune.lora_gated_activation.default, (*given, activation))
    backward = torch.ops.deltatune.lora_gated_activation_backward.default
    torch.library.opcheck(backward, (torch.ones_like(given[0]), *given, activation))


def test_the_adapters_products_count():
    given = operands(5, 12, (16, 32), torch.float32)
    with FlopCounterMode(display=False) as counter:
        lora_gated_activation(*given, "silu")
    assert counter.get_total_flops() == 2 * 5 * 12 * 48
    with FlopCounterMode(display=False) as counter:
        lora_gated_activation_backward(given[0], *given, "silu")
    assert counter.get_total_flops() == 2 * 5 * 12 * 48


def test_auto_takes_the_kernels_at_widths_that_pay(monkeypatch):
    wide = LoraGatedSpec(CUDA, torch.bfloat16, width=17)
    assert choose(LoraGatedSpec(torch.device("cpu"), torch.bfloat16, width=16)).impl == "reference"
    monkeypatch.setattr(providers, "triton_refusal", lambda *_: None)
    for width in (1, 16):
        assert choose(LoraGatedSpec(CUDA, torch.bfloat16, width=width)).impl == "triton"
    assert choose(wide).impl == "reference"
    assert choose(wide, "triton").reason == "named by the caller"
    assert choose(LoraGatedSpec(CUDA, torch.bfloat16)).impl == "reference"


def test_what_the_kernels_cannot_take_is_refused(monkeypatch):
    monkeypatch.setattr(providers, "triton_refusal", lambda *_: None)
    with pytest.raises(ValueError, match=r"up to 64 columns .* got 65; use impl='reference'"):
        choose(LoraGatedSpec(CUDA, torch.bfloat16, width=65), "triton")
    with pytest.raises(ValueError, match=r"the kernels take bf16 and fp16, got torch.float32"):
        choose(LoraGatedSpec(CUDA, torch.float32, width=16), "triton")
    monkeypatch.undo()
    made = case(3)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU, the inputs are on cpu; use impl='reference'"):
        lora_gated(made.x, made.weights, made.adapters, impl="triton")


def test_a_named_kernel_runs_the_sums(monkeypatch):
    """The width that is asked about is the larger layer's."""
    monkeypatch.setattr(providers, "triton_refusal", lambda *_: None)
    made = case(9, dtype=torch.bfloat16)
    found = lora_gated(made.x, made.weights, made.adapters, activation="gelu_tanh", impl="triton")
    assert torch.equal(found, made.run("sums", "gelu_tanh"))
    assert not torch.equal(found, made.run("reference", "gelu_tanh"))
    monkeypatch.setattr(providers, "_WIDEST", 24)
    with pytest.raises(ValueError, match="got 25"):
        lora_gated(made.x, made.weights, made.adapters, impl="triton")


def changed(what: str, made: Case) -> dict[str, Any]:
    given: dict[str, Any] = {"x": made.x, "weights": made.weights, "adapters": made.adapters}
    (adapter,), rest = made.adapters
    changes: dict[str, dict[str, Any]] = {
        "activation": {"activation": "relu"},
        "one weight": {"weights": made.weights[:1]},
        "no adapter": {"adapters": [[], rest]},
        "widths": {"weights": [made.weights[0], made.weights[1][1:]]},
        "factor": {"adapters": [[adapter._replace(down=adapter.down[:, 1:])], rest]},
        "ranks": {"adapters": [[adapter._replace(up=adapter.up[:, 1:])], rest]},
        "weight dtype": {"weights": [w.float() for w in made.weights]},
        "integers": {"adapters": [[adapter._replace(up=adapter.up.detach().long())], rest]},
        "device": {"adapters": [[adapter._replace(up=adapter.up.detach().to("meta"))], rest]},
    }
    return given | changes[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("activation", "activation must be 'silu' or 'gelu_tanh', got 'relu'"),
        ("one weight", r"got 1 weights and \[1, 2\] adapters"),
        ("no adapter", r"got 2 weights and \[0, 2\] adapters"),
        ("widths", r"weight \[39, 24\]"),
        ("factor", r"A and B \[\(\[3, 23\], \[40, 3\]\)\]"),
        ("ranks", r"A and B \[\(\[3, 24\], \[40, 2\]\)\]"),
        ("weight dtype", "expected weights in the dtype of x, torch.float64, got torch.float32"),
        ("integers", "B must be floating point, got torch.int64"),
        ("device", "B is on meta but x is on cpu"),
    ],
)
def test_what_does_not_fit_is_an_error(what, message):
    with pytest.raises(ValueError, match=f"^lora_gated: .*{message}"):
        lora_gated(**changed(what, case(3)))
