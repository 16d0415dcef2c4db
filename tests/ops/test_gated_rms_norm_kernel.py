"""The gated norm's kernels against the reference, on a GPU and, by test_interpreted.py, in Triton's interpreter."""

# B batch, T tokens, N heads, D head dim

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.ops import GatedRmsNormSpec, choose, gated_rms_norm
from deltatune.ops._gated_rms_norm import providers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates where bf16 should round
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
if not INTERPRETED:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    if INTERPRETED:
        from deltatune.ops._gated_rms_norm import kernel

        monkeypatch.setattr(providers, "triton_refusal", lambda device, dtype: None)
        # several programs and tiles for a few tokens
        monkeypatch.setattr(kernel, "_ELEMENTS", 128)
        monkeypatch.setattr(kernel, "TILES", 2)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def make_inputs(*shape, dtype=torch.float32, weight_dtype=None):
    x, gate = (draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    return x, gate, draw(shape[-1], seed=2, dtype=weight_dtype or dtype).requires_grad_()


def run(inputs, impl, *, grad=None, eps=EPS):
    """The output and the three gradients, with memory that nothing wrote full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y = gated_rms_norm(*inputs, eps=eps, impl=impl)
        grad = draw(*y.shape, seed=3) if grad is None else grad
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]
    finally:
        torch.use_deterministic_algorithms(False)


def in_float64(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def errors(got, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True)]


@pytest.mark.parametrize("tokens", [1, 7] if INTERPRETED else [1, 63, 65, 1000])
@pytest.mark.parametrize("dim", [8, 12])
def test_equals_the_reference(dim, tokens):
    inputs = make_inputs(1, tokens, 3, dim)
    for x, y in zip(run(inputs, "triton"), run(in_float64(inputs), "reference"), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 16), (4,), (0, 8)])
def test_any_number_of_dims(shape):
    inputs = make_inputs(*shape)
    for x, y in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
def test_error_is_within_twice_that_of_the_reference(dtype, weight_dtype):
    inputs = make_inputs(1, 7 if INTERPRETED else 70, 3, 32, dtype=dtype, weight_dtype=weight_dtype)
    exact = run(in_float64(inputs), "reference")
    got, budget = (errors(run(inputs, impl), exact) for impl in ("triton", "reference"))
    assert all(x <= 2 * y for x, y in zip(got, budget, strict=True)), (got, budget)


def test_a_gate_of_another_dtype():
    x, gate, weight = make_inputs(1, 9, 3, 16)
    inputs = (x.detach().half().requires_grad_(), gate, weight)
    got, expected = run(inputs, "triton"), run(inputs, "reference")
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


def test_strided_inputs_and_gradients():
    x, gate, weight = make_inputs(2, 9, 3, 16)
    expected, grad = run((x, gate, weight), "triton"), draw(2, 9, 3, 16, seed=3)
    scattered = grad.transpose(1, 3).contiguous().transpose(1, 3)
    views = [
        torch.cat([x.flatten(2), gate.flatten(2)], dim=-1).unflatten(-1, (6, 16)).split(3, dim=2),
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, gate)],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, gate)],
    ]
    for pair in views:
        assert not any(t.is_contiguous() for t in pair)
        got = run((*(t.detach().requires_grad_() for t in pair), weight), "triton", grad=scattered)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert got[0].is_contiguous()


def test_another_token_stays_out_of_it():
    x, gate, weight = make_inputs(1, 20, 3, 16)
    expected, grad = run((x, gate, weight), "triton"), draw(1, 20, 3, 16, seed=3)
    poisoned = [t.detach().clone() for t in (x, gate)]
    for t in (*poisoned, grad):
        t[:, 7] = torch.nan
    got = run((*(t.requires_grad_() for t in poisoned), weight), "triton", grad=grad)
    keep = torch.arange(20, device=DEVICE) != 7
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert a[:, 7].isnan().all()
        assert torch.equal(a[:, keep], b[:, keep])


def test_rows_past_the_end_add_nothing_to_the_weight_gradient_without_eps():
    inputs = make_inputs(1, 1, 1, 16)
    for x, y in zip(run(inputs, "triton", eps=0.0), run(inputs, "reference", eps=0.0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_costs_no_gradient():
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.deltatune.gated_rms_norm_backward.default:
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    x, gate, weight = make_inputs(1, 9, 3, 16)
    with Watch():
        gated_rms_norm(x, gate, weight.detach(), eps=EPS, impl="triton").sum().backward()
        assert x.grad is not None
        gated_rms_norm(x, gate, weight, eps=EPS, impl="triton").sum().backward()
    assert asked == [False, True]


def test_backward_repeats_and_writes_into_nothing_it_is_given():
    shape = (1, 9 if INTERPRETED else 300, 3, 16)
    given = [x.detach() for x in (draw(*shape, seed=3), *make_inputs(*shape))]
    before = [x.clone() for x in given]
    calls = [torch.ops.deltatune.gated_rms_norm_backward(*given, EPS, True) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*calls, strict=True))


def test_opcheck():
    inputs = make_inputs(1, 2, 3, 16)
    torch.library.opcheck(torch.ops.deltatune.gated_rms_norm.default, (*inputs, EPS))
    given = (draw(1, 2, 3, 16, seed=3), *(x.detach() for x in inputs), EPS)
    for weight_grad in (False, True):
        torch.library.opcheck(torch.ops.deltatune.gated_rms_norm_backward.default, (*given, weight_grad))


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = make_inputs(1, 9, 3, 16)
    compiled = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    got, expected = (f(*inputs, eps=EPS, impl="triton") for f in (compiled, gated_rms_norm))
    assert torch.equal(got, expected)
    grad = draw(*got.shape, seed=3)
    for x, y in zip(*(torch.autograd.grad(y, inputs, grad) for y in (got, expected)), strict=True):
        assert torch.equal(x, y)


def test_a_second_derivative_is_refused():
    inputs = make_inputs(1, 9, 3, 16)
    y = gated_rms_norm(*inputs, eps=EPS, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; .* use impl='reference'"):
        dx.sum().backward()


def test_auto_takes_the_kernel():
    assert choose(GatedRmsNormSpec(torch.device(DEVICE), torch.float32)).impl == "triton"
    inputs = make_inputs(1, 9, 3, 16, dtype=HALVES[-1])
    assert torch.equal(gated_rms_norm(*inputs, eps=EPS), gated_rms_norm(*inputs, eps=EPS, impl="triton"))


def test_offsets_beyond_32_bits():
    """Heads ``2^30`` elements apart: the third lies beyond what 32 bits count."""
    x, gate, weight = make_inputs(2, 3, 16, dtype=torch.float16)
    expected = run((x, gate, weight), "triton")
    buffers = [torch.empty(2**31 + 2**10, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    views = [buffer.as_strided((2, 3, 16), (16, 2**30, 1)) for buffer in buffers]
    far = [view.copy_(y.detach()).requires_grad_() for view, y in zip(views, (x, gate), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(run((*far, weight), "triton"), expected, strict=True))
