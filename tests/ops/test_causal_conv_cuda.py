"""The Triton convolution on a GPU against the reference in float64."""

# B batch, T tokens, D channels, W width

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.ops import CausalConvSpec, causal_conv, choose
from deltatune.ops._causal_conv import reference
from deltatune.packing.sequences import Sequences

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = {
    "mixed": [5, 1, 70, 7],
    "edges": [3, 2, 1, 63, 64, 65],
    "long": [127, 257, 64, 1000],
    "many": [1 + 7 * n % 40 for n in range(512)],
}
PADDING = 9
PARTS = {
    "whole": {},
    "split": {"split": (256, 128, 128)},
    "uneven": {"split": (200, 8, 304)},
    "normalised": {"split": (256, 128, 128), "l2norm": (128, 128, 0)},
    "small heads": {"split": (256, 128, 128), "l2norm": (64, 0, 64)},
    "odd heads": {"split": (240, 144, 128), "l2norm": (24, 48, 0)},
}
D = 512


def make_inputs(tokens, *, batch=1, channels=D, width=4, bias=True, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, tokens, channels), (channels, width)] + [(channels,)] * bias
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def described(lengths):
    return Sequences.from_lengths(lengths, total=sum(lengths) + PADDING).to("cuda")


def parts_of(y):
    return y if isinstance(y, tuple) else (y,)


def weights_of(y):
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(x.shape, generator=generator, device="cuda").bfloat16().to(x.dtype) for x in y]


def run(inputs, **kwargs):
    """The outputs and the gradients of a weighted sum of them."""
    y = parts_of(causal_conv(*inputs, **kwargs))
    return [*(x.detach() for x in y), *torch.autograd.grad(y, inputs, weights_of(y))]


def relative_errors(got, expected):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


def assert_within_budget(inputs, **kwargs):
    exact = run([x.detach().double().requires_grad_() for x in inputs], impl="reference", **kwargs)
    budget = relative_errors(run(inputs, impl="reference", **kwargs), exact)
    got = run(inputs, impl="triton", **kwargs)
    assert [x.dtype for x in got[-len(inputs) :]] == [x.dtype for x in inputs]
    errors = relative_errors(got, exact)
    assert all(error <= 2 * allowed for error, allowed in zip(errors, budget, strict=True)), (errors, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_error_is_within_twice_that_of_the_reference(lengths, parts, dtype):
    inputs = make_inputs(sum(lengths) + PADDING, dtype=dtype)
    assert_within_budget(inputs, sequences=described(lengths), **parts)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_widths_biases_and_activations(activation, bias, width):
    lengths = LENGTHS["edges"]
    inputs = make_inputs(sum(lengths) + PADDING, width=width, bias=bias)
    assert_within_budget(inputs, sequences=described(lengths), activation=activation)


@pytest.mark.parametrize("channels", [1, 7, 96, 6144])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 63), (3, 65), (1, 1), (1, 1000)])
def test_without_sequences_each_row_is_one_document(batch, tokens, channels):
    inputs = make_inputs(tokens, batch=batch, channels=channels)
    rows = Sequences.from_lengths([tokens] * batch).to("cuda")
    for x, y in zip(run(inputs, impl="triton"), run(inputs, impl="triton", sequences=rows), strict=True):
        assert torch.equal(x, y)
    assert_within_budget(inputs)


def test_an_fp32_weight_with_bf16_and_autocast():
    x, weight, bias = make_inputs(83)
    mixed = [x, *(y.detach().float().requires_grad_() for y in (weight, bias))]
    assert_within_budget(mixed)
    plain = run(mixed, impl="triton", split=(256, 256), l2norm=(128, 0))
    with torch.autocast("cuda", torch.float16):
        under = run(mixed, impl="triton", split=(256, 256), l2norm=(128, 0))
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize("parts", [PARTS["whole"], PARTS["normalised"]], ids=["whole", "normalised"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("document", [0, 1, -1])
def test_gradient_reaches_no_other_document(lengths, document, parts):
    x, weight, bias = make_inputs(sum(lengths) + PADDING)
    begin = sum(lengths[:document]) if document >= 0 else sum(lengths) - lengths[-1]
    own = slice(begin, begin + lengths[document])
    y = parts_of(causal_conv(x, weight, bias, sequences=described(lengths), impl="triton", **parts))
    (grad,) = torch.autograd.grad([part[:, own] for part in y], [x], [part[:, own] for part in weights_of(y)])
    assert grad[:, own].count_nonzero() > 0
    assert grad[:, : own.start].count_nonzero() == 0
    assert grad[:, own.stop :].count_nonzero() == 0


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
@pytest.mark.parametrize("parts", [PARTS["whole"], PARTS["normalised"]], ids=["whole", "normalised"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_changing_a_document_leaves_the_others_bit_identical(lengths, parts, value):
    sequences = described(lengths)
    inputs = make_inputs(sum(lengths) + PADDING)
    document = len(lengths) // 2
    own = slice(sum(lengths[:document]), sum(lengths[: document + 1]))
    changed = inputs[0].detach().clone()
    changed[:, own] = value
    before = run(inputs, sequences=sequences, impl="triton", **parts)
    after = run([changed.requires_grad_(), *inputs[1:]], sequences=sequences, impl="triton", **parts)
    for x, y in zip(before[:-2], after[:-2], strict=True):
        assert not torch.equal(x[:, own], y[:, own])
        assert torch.equal(x[:, : own.start], y[:, : own.start])
        assert torch.equal(x[:, own.stop :], y[:, own.stop :])


def test_a_gradient_that_is_nan_stays_inside_its_document():
    lengths = LENGTHS["edges"]
    x, weight, bias = make_inputs(sum(lengths) + PADDING)
    y = causal_conv(x, weight, bias, sequences=described(lengths), impl="triton")
    (weights,) = weights_of([y])
    (before,) = torch.autograd.grad(y, [x], weights, retain_graph=True)
    own = slice(sum(lengths[:3]), sum(lengths[:4]))
    weights[:, own] = math.nan
    (after,) = torch.autograd.grad(y, [x], weights)
    assert after[:, own].isnan().all()
    assert torch.equal(before[:, : own.start], after[:, : own.start])
    assert torch.equal(before[:, own.stop :], after[:, own.stop :])


def test_views_of_a_projection_are_read_in_place():
    lengths = LENGTHS["mixed"]
    x, weight, bias = make_inputs(sum(lengths) + PADDING)
    for width, left in ((D + 64, 0), (D + 64, 64), (D + 3, 3)):
        wide = torch.full((1, x.shape[1], width), math.nan, device="cuda", dtype=x.dtype)
        wide[..., left : left + D] = x.detach()
        view = wide[..., left : left + D].requires_grad_()
        assert not view.is_contiguous()
        for a, b in zip(
            run([view, weight, bias], impl="triton", sequences=described(lengths)),
            run([x, weight, bias], impl="triton", sequences=described(lengths)),
            strict=True,
        ):
            assert torch.equal(a, b)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    rows = x.detach().repeat(2, 2, 1)[:, : x.shape[1]].requires_grad_()  # rows that are no even stream
    assert torch.equal(causal_conv(turned, weight, bias, impl="triton"), causal_conv(x, weight, bias, impl="triton"))
    assert torch.equal(
        causal_conv(rows, weight, bias, impl="triton"), causal_conv(x, weight, bias, impl="triton").expand_as(rows)
    )


def test_gradients_that_are_expanded_strided_or_missing():
    x, weight, bias = make_inputs(83)
    options = {"split": (256, 128, 128), "impl": "triton"}
    y = causal_conv(x, weight, bias, **options)
    ones = [torch.ones_like(part) for part in y]
    expected = torch.autograd.grad(y, [x, weight, bias], ones, retain_graph=True)
    got = torch.autograd.grad(sum(part.sum() for part in y), [x, weight, bias], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    strided = [torch.ones(1, 83, 600, device="cuda", dtype=x.dtype)[..., : part.shape[-1]] for part in y]
    got = torch.autograd.grad(y, [x, weight, bias], strided, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    zeroed = torch.autograd.grad(y, [x, weight, bias], [ones[0] * 0, ones[1], ones[2] * 0], retain_graph=True)
    got = torch.autograd.grad(y[1], [x, weight, bias], ones[1])
    assert all(torch.equal(a, b) for a, b in zip(got, zeroed, strict=True))


def test_parts_are_contiguous_and_equal_the_whole():
    x, weight, bias = make_inputs(83)
    whole = causal_conv(x, weight, bias, impl="triton")
    parts = causal_conv(x, weight, bias, split=(200, 0, 312), impl="triton")
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_a_frozen_convolution_computes_no_weight_gradient():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.deltatune.causal_conv_backward.default:
                seen.append(args[-2:])
            return func(*args, **(kwargs or {}))

    x, weight, bias = make_inputs(83)
    for frozen, wanted in (((weight, bias), (False, False)), ((bias,), (True, False)), ((), (True, True))):
        for y in (weight, bias):
            y.requires_grad_(all(y is not z for z in frozen))
        with Watch():
            causal_conv(x, weight, bias, impl="triton").sum().backward()
        assert seen[-1] == wanted


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("trained", ["x", "x and bias", "x and weight"])
def test_gradients_are_the_same_whatever_else_trains(trained, width):
    inputs = make_inputs(300, width=width)
    whole = dict(
        zip(("x", "weight", "bias"), run(inputs, impl="triton", sequences=described([100, 191]))[-3:], strict=True)
    )
    names = trained.split(" and ")
    some = [x.detach().requires_grad_(name in names) for name, x in zip(whole, inputs, strict=True)]
    y = causal_conv(*some, impl="triton", sequences=described([100, 191]))
    wanted = [x for x in some if x.requires_grad]
    for name, grad in zip(names, torch.autograd.grad(y, wanted, weights_of([y])), strict=True):
        torch.testing.assert_close(grad, whole[name], rtol=1e-2, atol=1e-2)


def test_weight_gradients_have_the_same_bits_every_time():
    x, weight, bias = make_inputs(5000)
    first, second = (run([x, weight, bias], impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    x, weight, bias = make_inputs(0)
    y = causal_conv(x, weight, bias, impl="triton")
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.count_nonzero() == 0


def test_a_second_derivative_is_refused():
    x, weight, bias = make_inputs(5)
    (grad,) = torch.autograd.grad(causal_conv(x, weight, bias, impl="triton").sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_nothing_waits_for_the_device():
    inputs = make_inputs(160)
    batches = [described(x) for x in ([5, 1, 70, 75], [60, 20, 40, 31])]

    def step(sequences):
        run(inputs, sequences=sequences, impl="triton", split=(256, 256), l2norm=(128, 0))

    step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    inputs = [*make_inputs(83, bias=bias), None][:3]
    positions = Sequences.from_lengths([5, 1, 70, 7]).to("cuda").positions
    options = (positions, [256, 256], [128, 0], True)
    torch.library.opcheck(torch.ops.deltatune.causal_conv.default, (*inputs, *options))
    detached = [None if x is None else x.detach() for x in inputs]
    grads = weights_of(torch.ops.deltatune.causal_conv(*detached, *options))
    for wanted in ((True, bias), (False, False)):
        arguments = (grads, *detached, *options, *wanted)
        torch.library.opcheck(torch.ops.deltatune.causal_conv_backward.default, arguments)


def test_compiles_whole_and_only_once_for_any_documents():
    torch._dynamo.reset()
    inputs = make_inputs(83)
    options = {"split": (256, 256), "l2norm": (128, 0), "impl": "auto"}
    compiled = torch.compile(causal_conv, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 1, 70, 7], [83], [1] * 83):
            sequences = Sequences.from_lengths(lengths).to("cuda")
            y = compiled(*inputs, sequences=sequences, **options)
            got = [*y, *torch.autograd.grad(y, inputs, weights_of(y))]
            for a, b in zip(got, run(inputs, sequences=sequences, **options), strict=True):
                assert torch.equal(a, b)


def test_auto_takes_triton_where_it_can_run():
    assert choose(CausalConvSpec(torch.device("cuda"), torch.bfloat16)).impl == "triton"
    assert choose(CausalConvSpec(torch.device("cuda"), torch.float64)).impl == "reference"
    assert choose(CausalConvSpec(torch.device("cuda"), torch.bfloat16, width=9)).impl == "reference"
    x, weight, bias = make_inputs(83)
    assert torch.equal(causal_conv(x, weight, bias), causal_conv(x, weight, bias, impl="triton"))
    with pytest.raises(ValueError, match="takes widths up to 8, got 9; use impl='reference'"):
        causal_conv(x, torch.zeros(D, 9, device="cuda", dtype=x.dtype), impl="triton")


def test_heads_in_one_kernel_equal_heads_normalised_after_it():
    x, weight, bias = make_inputs(83)
    q, v = causal_conv(x, weight, bias, split=(256, 256), l2norm=(128, 0), impl="triton")
    plain = causal_conv(x, weight, bias, split=(256, 256), impl="triton")
    assert torch.equal(v, plain[1])
    torch.testing.assert_close(q, reference.normalise(plain[0], 128))
