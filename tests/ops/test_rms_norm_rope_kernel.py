"""The norm-and-rope kernels against the reference, on a GPU and, by test_interpreted.py, in Triton's interpreter."""

# B batch, T tokens, N and M heads of q and k, D head dim, R rotary dim

import functools
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deltatune.ops import RmsNormRopeSpec, choose, rms_norm_rope, rms_norm_rope_pair
from deltatune.ops._rms_norm_rope import providers, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates where bf16 should round
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
if not INTERPRETED:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6
FORMS = {
    "qwen3": {"dim": 16, "rotary": 16, "unit_offset": False},
    "qwen3_5": {"dim": 32, "rotary": 8, "unit_offset": True},
    "odd": {"dim": 24, "rotary": 6, "unit_offset": True},
    "lopsided": {"dim": 15, "rotary": 2, "unit_offset": False},
    "norm_alone": {"dim": 48, "rotary": 0, "unit_offset": True},
    "no_weight": {"dim": 16, "rotary": 4, "unit_offset": False, "weight": False},
}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    if INTERPRETED:
        from deltatune.ops._rms_norm_rope import kernel

        monkeypatch.setattr(providers, "triton_refusal", lambda device, dtype: None)
        # several programs and tiles for a few tokens
        for name, size in (("_ELEMENTS", 256), ("_SUMMED_ELEMENTS", 128), ("_TILES", 2)):
            monkeypatch.setattr(kernel, name, size)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def make_inputs(
    *, batch=1, tokens=9, heads=3, dim=16, rotary=8, rows=None, dtype=torch.float32, weight=True, unit_offset=False
):
    """``(x, weight, cos, sin)`` and the options that go with them."""
    angles = 3 * draw(rows or batch, tokens, rotary // 2, seed=2, dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=-1)
    x = draw(batch, tokens, heads, dim, dtype=dtype).requires_grad_()
    scale = draw(dim, seed=1, dtype=dtype).requires_grad_() if weight else None
    return (x, scale, angles.cos().to(dtype), angles.sin().to(dtype)), {"eps": EPS, "unit_offset": unit_offset}


def run(inputs, options, impl, *, grad=None):
    """The output and the gradients of x and the weight, with memory that nothing wrote full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y = rms_norm_rope(*inputs, **options, impl=impl)
        wanted = [x for x in inputs[:2] if x is not None]
        grad = draw(*y.shape, seed=3) if grad is None else grad
        return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]
    finally:
        torch.use_deterministic_algorithms(False)


def in_float64(inputs):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


def errors(got, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True)]


@pytest.mark.parametrize("tokens", [7] if INTERPRETED else [1, 63, 65, 1000])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_reference(form, tokens):
    inputs, options = make_inputs(tokens=tokens, **form)
    got, expected = run(inputs, options, "triton"), run(in_float64(inputs), options, "reference")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_error_is_within_twice_that_of_the_reference(form, dtype):
    inputs, options = make_inputs(tokens=7 if INTERPRETED else 70, dtype=dtype, **form)
    exact = run(in_float64(inputs), options, "reference")
    got, budget = (errors(run(inputs, options, impl), exact) for impl in ("triton", "reference"))
    assert all(x <= 2 * y for x, y in zip(got, budget, strict=True)), (got, budget)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [2560] if INTERPRETED else [2048, 2560])
def test_one_head_as_wide_as_the_stream(dim, dtype):
    inputs, options = make_inputs(batch=2, tokens=3, heads=1, dim=dim, rotary=0, dtype=dtype, unit_offset=True)
    exact = run(in_float64(inputs), options, "reference")
    got, budget = (errors(run(inputs, options, impl), exact) for impl in ("triton", "reference"))
    assert all(x <= 2 * y for x, y in zip(got, budget, strict=True)), (got, budget)
    frozen = (inputs[0], inputs[1].detach(), *inputs[2:])
    (dx,) = torch.autograd.grad(rms_norm_rope(*frozen, **options, impl="triton").sum(), frozen[0])
    (expected,) = torch.autograd.grad(rms_norm_rope(*inputs, **options, impl="triton").sum(), inputs[0])
    assert torch.equal(dx, expected)


@pytest.mark.skipif(INTERPRETED, reason="rsqrt differs in the last bit from torch's on a CPU")
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rounds_as_the_reference_does(unit_offset, dtypes):
    (_, weight, cos, sin), options = make_inputs(
        tokens=40, dim=128, rotary=64, dtype=dtypes[0], unit_offset=unit_offset
    )
    whole = torch.randint(-8, 9, (1, 40, 3, 128), device=DEVICE).to(dtypes[0])  # sums of squares are exact
    cos, sin = cos.to(dtypes[1]), sin.to(dtypes[1])
    got, expected = (rms_norm_rope(whole, weight, cos, sin, **options, impl=x) for x in ("triton", "reference"))
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes_promote_as_in_the_reference(dtypes):
    inputs, options = make_inputs(dtype=dtypes[0])
    inputs = (inputs[0], inputs[1].detach().to(dtypes[1]).requires_grad_(), *inputs[2:])
    got, expected = run(inputs, options, "triton"), run(inputs, options, "reference")
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_share_cos_and_sin_or_have_their_own(rows):
    inputs, options = make_inputs(batch=2, rows=rows)
    for x, y in zip(run(inputs, options, "triton"), run(inputs, options, "reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_gradients():
    (x, weight, cos, sin), options = make_inputs(batch=2)
    expected = run((x, weight, cos, sin), options, "triton")
    grad = draw(*x.shape, seed=3)
    views = {
        "half of a projection": torch.cat([x, -x], dim=-1)[..., : x.shape[-1]],
        "heads before tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "dims strided": x.transpose(2, 3).contiguous().transpose(2, 3),
        "rows strided": torch.stack([x, x], dim=1)[:, 0],
    }
    for name, view in views.items():
        view, scattered = view.detach().requires_grad_(), grad.transpose(1, 3).contiguous().transpose(1, 3)
        assert not view.is_contiguous()
        got = run(
            (view, weight, cos.transpose(1, 2).contiguous().transpose(1, 2), sin), options, "triton", grad=scattered
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
        assert got[0].is_contiguous()


def test_another_token_stays_out_of_it():
    inputs, options = make_inputs(tokens=20, weight=False)
    expected, grad = run(inputs, options, "triton"), draw(1, 20, 3, 16, seed=3)
    poisoned = inputs[0].detach().clone()
    poisoned[:, 7], grad[:, 7] = torch.nan, torch.nan
    got = run((poisoned.requires_grad_(), *inputs[1:]), options, "triton", grad=grad)
    for x, y in zip(got, expected, strict=True):
        assert x[:, 7].isnan().all()
        keep = torch.arange(20, device=DEVICE) != 7
        assert torch.equal(x[:, keep], y[:, keep])


def test_a_zero_head_without_eps_does_not_reach_the_weight_gradient_of_rows_past_the_end():
    inputs, options = make_inputs(tokens=1, heads=1)
    got, expected = (run(inputs, options | {"eps": 0.0}, impl) for impl in ("triton", "reference"))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    inputs, options = make_inputs(tokens=0)
    y, dx, dweight = run(inputs, options, "triton")
    assert y.shape == dx.shape == inputs[0].shape
    assert dweight.count_nonzero() == 0


def make_pair(*, tokens=9):
    """q as the half of a gated projection that it is in Qwen3.5."""
    (k, k_weight, cos, sin), options = make_inputs(tokens=tokens, heads=2, unit_offset=True)
    q = draw(1, tokens, 4, 32, seed=4)[..., :16].requires_grad_()
    return (q, k, draw(16, seed=5).requires_grad_(), k_weight), (cos, sin), options


def one_by_one(q, k, q_weight, k_weight, cos, sin, **options):
    return rms_norm_rope(q, q_weight, cos, sin, **options), rms_norm_rope(k, k_weight, cos, sin, **options)


def test_a_pair_is_two_calls_bit_for_bit():
    trained, angles, options = make_pair()
    results = []
    for function in (rms_norm_rope_pair, one_by_one):
        outs = function(*trained, *angles, **options, impl="triton")
        results.append([*outs, *torch.autograd.grad(outs, trained, [draw(*x.shape, seed=6) for x in outs])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_q_and_k_of_different_dtypes_go_one_by_one():
    (q, k, q_weight, k_weight), angles, options = make_pair()
    inputs = (q, k.detach().half(), q_weight, k_weight, *angles)
    for x, y in zip(
        rms_norm_rope_pair(*inputs, **options, impl="triton"),
        one_by_one(*inputs, **options, impl="triton"),
        strict=True,
    ):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_frozen_weights_cost_no_gradient():
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.deltatune.rms_norm_rope_backward.default:
                asked.append(args[-1])
            return func(*args, **(kwargs or {}))

    (x, weight, cos, sin), options = make_inputs()
    with Watch():
        rms_norm_rope(x, weight.detach(), cos, sin, **options, impl="triton").sum().backward()
        assert x.grad is not None
        rms_norm_rope(x, weight, cos, sin, **options, impl="triton").sum().backward()
    assert asked == [False, True]


def test_backward_repeats_and_writes_into_nothing_it_is_given():
    trained, angles, options = make_pair(tokens=9 if INTERPRETED else 300)
    given = [draw(*x.shape, seed=6) for x in trained[:2]] + [x.detach() for x in (*trained, *angles)]
    before = [x.clone() for x in given]
    calls = [torch.ops.deltatune.rms_norm_rope_backward(*given, *options.values(), True) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*calls, strict=True))


@pytest.mark.parametrize(
    "given", ["q and k", "q without weight"] if INTERPRETED else ["q", "q and k", "q without weight"]
)
def test_opcheck(given):
    (q, k, q_weight, k_weight), angles, options = make_pair(tokens=1)
    k, k_weight = (k, k_weight) if given == "q and k" else (None, None)
    q_weight = None if given == "q without weight" else q_weight
    arguments = (q, k, q_weight, k_weight, *angles, *options.values())
    torch.library.opcheck(torch.ops.deltatune.rms_norm_rope.default, arguments)
    grads = [None if x is None else draw(*x.shape, seed=6) for x in (q, k)]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    for weight_grad in (False, True):
        torch.library.opcheck(torch.ops.deltatune.rms_norm_rope_backward.default, (*grads, *detached, weight_grad))


def test_compiles_whole():
    torch._dynamo.reset()
    trained, angles, options = make_pair()
    compiled = torch.compile(rms_norm_rope_pair, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    results = []
    for function in (compiled, rms_norm_rope_pair):
        outs = function(*trained, *angles, **options, impl="triton")
        results.append([*outs, *torch.autograd.grad(outs, trained, [draw(*x.shape, seed=6) for x in outs])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_checkpointing_recomputes_it():
    trained, angles, options = make_pair()
    results = []
    for wrap in (lambda function, *args: function(*args), functools.partial(checkpoint, use_reentrant=False)):
        outs = wrap(lambda *args: rms_norm_rope_pair(*args, *angles, **options, impl="triton"), *trained)
        results.append(torch.autograd.grad(outs, trained, [draw(*x.shape, seed=6) for x in outs]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_second_derivative_is_refused():
    inputs, options = make_inputs()
    y = rms_norm_rope(*inputs, **options, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; .* use impl='reference'"):
        dx.sum().backward()


def test_a_gradient_for_cos_or_sin_is_the_references():
    (x, weight, cos, sin), options = make_inputs()
    cos.requires_grad_()
    with pytest.raises(ValueError, match="no gradient for cos and sin; detach them"):
        rms_norm_rope(x, weight, cos, sin, **options, impl="triton")
    assert torch.equal(
        rms_norm_rope(x, weight, cos, sin, **options), reference.rms_norm_rope(x, weight, cos, sin, EPS, False)
    )
    with torch.no_grad():
        rms_norm_rope(x, weight, cos, sin, **options, impl="triton")


def test_auto_takes_the_kernel():
    assert choose(RmsNormRopeSpec(torch.device(DEVICE), torch.float32)).impl == "triton"
    inputs, options = make_inputs(dtype=HALVES[-1])
    assert torch.equal(rms_norm_rope(*inputs, **options), rms_norm_rope(*inputs, **options, impl="triton"))


def far_apart(x, dim):
    """The same values in fp16, ``2^30`` elements apart along a dimension: the third lies beyond what 32 bits count."""
    apart = 2**30
    buffer = torch.empty(apart * (x.shape[dim] - 1) + x.numel(), dtype=torch.float16, device=DEVICE)
    strides = [apart if i == dim else stride for i, stride in enumerate(x.stride())]
    return buffer.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("far", ["heads", "angles"])
def test_offsets_beyond_32_bits(far):
    (x, weight, cos, sin), options = make_inputs(tokens=3, heads=3, dtype=torch.float16)
    expected = run((x, weight, cos, sin), options, "triton")
    if far == "heads":
        x = far_apart(x.detach(), 2).requires_grad_()
    else:
        cos, sin = far_apart(cos, 1), far_apart(sin, 1)
    got = run((x, weight, cos, sin), options, "triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
