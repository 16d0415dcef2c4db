"""The kernels of a gated activation, on a GPU and, by test_interpreted.py, in Triton's interpreter."""

# M tokens, N outputs of gate and of up, W columns of one layer's u and B

import os

import pytest
import torch
import torch.nn.functional as F

from deltatune.ops import Adapter, LoraGatedSpec, choose, lora_gated
from deltatune.ops._lora_gated import op, providers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates where bf16 should round
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
if not INTERPRETED:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
#: tokens and outputs: less than a tile, ragged both ways, whole tiles, odd rows that no vector fits
RAGGED = (40, 104) if INTERPRETED else (70, 208)
SHAPES = [(1, 40), RAGGED, (64, 64), (33, 71)]
if not INTERPRETED:
    SHAPES += [(5501, 1552), (16384, 6144), (333, 1023)]
WIDTHS = [(16, 16), (48, 32), (64, 16)]


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    if INTERPRETED:
        from deltatune.ops._lora_gated import kernel

        for module in (op, providers):
            monkeypatch.setattr(module, "triton_refusal", lambda device, dtype: None)
        # several programs and steps for a few tokens
        monkeypatch.setattr(kernel, "FORWARD", kernel.Tile(32, 32, 4, 1, 2))
        monkeypatch.setattr(kernel, "BACKWARD", kernel.Tile(16, 64, 4, 2, 3))


def draw(*shape, seed, dtype, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def inputs(tokens, outer, widths, dtype, more=0):
    """The gradient of the result, G, U, u, and B of both; all but the last inside wider matrices."""
    large = [draw(tokens, outer + more, seed=seed, dtype=dtype)[:, more:] for seed in range(3)]
    narrow = draw(tokens, sum(widths) + more, seed=3, dtype=dtype, scale=0.3)[:, more:]
    return *large, narrow, *(draw(outer, w, seed=4 + w, dtype=dtype, scale=0.3) for w in widths)


def results(grad, given, activation):
    """The result and both gradients, with memory that nothing wrote full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        h = op.lora_gated_activation(*given, activation)
        return [h, *op.lora_gated_activation_backward(grad, *given, activation)]
    finally:
        torch.use_deterministic_algorithms(False)


def plain(grad, given, activation):
    """The same in the dtype of what is given, each product added to its base."""
    gate, up, narrow, gate_b, up_b = given
    u, v = narrow[:, : gate_b.shape[1]], narrow[:, gate_b.shape[1] :]
    sums = [(base + low @ b.mT).requires_grad_() for base, low, b in ((gate, u, gate_b), (up, v, up_b))]
    h = ACTIVATIONS[activation](sums[0]) * sums[1]
    return [h.detach(), *torch.autograd.grad(h, sums, grad)]


def assert_within_twice_the_error_of_plain_products(grad, given, activation):
    found = results(grad, given, activation)
    theirs = plain(grad, given, activation)
    exact = plain(grad.double(), [x.double() for x in given], activation)
    for got, other, want in zip(found, theirs, exact, strict=True):
        assert got.dtype == grad.dtype
        assert got.shape == want.shape
        errors = [float((x.double() - want).norm() / want.norm()) for x in (got, other)]
        assert errors[0] <= 2 * errors[1]
        # of a result that is rounded once, wherever it is
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=0.1 * eps)
    return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("tokens", "outer"), SHAPES)
def test_is_as_exact_as_plain_products_and_repeats_its_bits(tokens, outer, widths, dtype):
    grad, *given = inputs(tokens, outer, widths, dtype)
    found = assert_within_twice_the_error_of_plain_products(grad, given, "silu")
    assert all(torch.equal(*pair) for pair in zip(found, results(grad, given, "silu"), strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu(dtype):
    grad, *given = inputs(*RAGGED, (16, 32), dtype)
    assert_within_twice_the_error_of_plain_products(grad, given, "gelu_tanh")


@pytest.mark.parametrize("more", [1, 8, 64])
def test_rows_of_larger_matrices(more):
    grad, *given = inputs(*RAGGED, (16, 32), torch.float16, more)
    want = results(grad.contiguous(), [x.contiguous() for x in given], "silu")
    assert all(torch.equal(*pair) for pair in zip(results(grad, given, "silu"), want, strict=True))


def test_columns_and_expanded_rows():
    grad, *given = inputs(40, 64, (16, 16), torch.float16)
    given[0], grad = given[0].mT.contiguous().mT, grad[:1].expand(40, -1)
    want = results(grad.contiguous(), [x.contiguous() for x in given], "silu")
    assert all(torch.equal(*pair) for pair in zip(results(grad, given, "silu"), want, strict=True))


def test_no_tokens():
    grad, *given = inputs(0, 64, (16, 16), torch.float16)
    assert [x.shape for x in results(grad, given, "silu")] == [(0, 64)] * 3


def test_large_values_saturate():
    grad, *given = inputs(40, 64, (16, 16), torch.float16)
    given[0] = given[0] * 2000
    for activation in ACTIVATIONS:
        assert all(x.isfinite().all() for x in results(grad, given, activation))


def test_a_row_that_is_not_finite_touches_no_other():
    grad, *given = inputs(70, 64, (16, 16), torch.float16)
    want = results(grad, given, "silu")
    for x in given[:3]:
        x[33] = float("nan")
    kept = torch.arange(70, device=DEVICE) != 33
    for got, expected in zip(results(grad, given, "silu"), want, strict=True):
        assert torch.equal(got[kept], expected[kept])
        assert got[33].isnan().all()


@pytest.mark.parametrize("tile", [(32, 64, 4, 1, 1), (16, 16, 4, 2, 100), (64, 128, 8, 3, 2)])
def test_other_tiles_give_the_same(tile):
    from deltatune.ops._lora_gated import kernel

    grad, *given = inputs(*((40, 72) if INTERPRETED else (100, 208)), (16, 32), torch.float16)
    want = results(grad, given, "silu")
    found = [torch.full_like(x, float("nan")) for x in want]
    kernel.forward(given, found[0], gelu=False, tile=kernel.Tile(*tile))
    kernel.backward(grad, given, found[1:], gelu=False, tile=kernel.Tile(*tile))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
def test_layers_with_adapters_of_any_rank(rank, dtype):
    """Against float64, twice the error of separate 16-bit products; the op, its gradients and all that is around."""
    tokens, inner, outer = (50, 48, 80) if INTERPRETED else (3000, 1024, 2064)
    x = draw(2, tokens, inner, seed=0, dtype=dtype).requires_grad_()
    weights = [draw(outer, inner, seed=seed, dtype=dtype, scale=inner**-0.5) for seed in (1, 2)]
    factors = [
        draw(*shape, seed=3 + i, dtype=torch.float32, scale=shape[1] ** -0.5).requires_grad_()
        for i, shape in enumerate([(rank, inner), (outer, rank)] * 2)
    ]
    adapters = [[Adapter(*factors[:2], 0.5)], [Adapter(*factors[2:], 2.0)]]
    leaves, grad = [x, *factors], draw(2, tokens, outer, seed=9, dtype=dtype)

    def separate(to):
        gate, up = (
            F.linear(x.to(to), w.to(to)) + s * F.linear(F.linear(x.to(to), a.to(to)), b.to(to))
            for w, ((a, b, s),) in zip(weights, adapters, strict=True)
        )
        return F.silu(gate) * up

    assert choose(LoraGatedSpec(x.device, dtype, rank), "triton").impl == "triton"
    outputs = [lora_gated(x, weights, adapters, impl="triton"), separate(dtype), separate(torch.float64)]
    found, theirs, exact = ([h, *torch.autograd.grad(h, leaves, grad.to(h.dtype))] for h in outputs)
    for got, other, want in zip(found, theirs, exact, strict=True):
        errors = [float((y.double() - want).detach().norm() / want.detach().norm()) for y in (got, other)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.skipif(INTERPRETED, reason="Inductor builds for a GPU")
def test_one_graph_on_a_gpu():
    x = draw(640, 256, seed=0, dtype=torch.bfloat16).requires_grad_()
    weights = [draw(512, 256, seed=seed, dtype=torch.bfloat16, scale=256**-0.5) for seed in (1, 2)]
    factors = [
        draw(*shape, seed=3, dtype=torch.float32, scale=0.1).requires_grad_() for shape in [(16, 256), (512, 16)]
    ]
    adapters = [[Adapter(*factors, 0.5)], [Adapter(*factors, 2.0)]]

    def block(x):
        return lora_gated(x, weights, adapters, impl="triton").square().mean()

    want = torch.autograd.grad(block(x), [x, *factors])
    found = torch.autograd.grad(torch.compile(block, fullgraph=True)(x), [x, *factors])
    for got, expected in zip(found, want, strict=True):
        assert float((got - expected).norm() / expected.norm()) <= 2e-2
