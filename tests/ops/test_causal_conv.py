"""The causal convolution against torch's own, run on every document alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops import CausalConvSpec, _nvidia, causal_conv, choose
from deltatune.ops._causal_conv import op
from deltatune.packing.sequences import Sequences

LENGTHS = ([5, 1, 70, 7], [3, 2, 1, 63, 64, 65], [1 + n % 3 for n in range(70)], [2])


def make_inputs(tokens, *, batch=1, channels=6, width=4, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, channels), (channels, width)] + [(channels,)] * bias
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def conv_of_each_document(x, weight, bias=None, *, activation="silu", lengths):
    outputs = []
    for document in x.flatten(0, 1).split(lengths):
        padded = F.pad(document.T.unsqueeze(0), (weight.shape[1] - 1, 0))
        outputs.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[-1])[0].T)
    y = torch.cat(outputs).reshape(x.shape)
    return F.silu(y) if activation == "silu" else y


def run(function, inputs, **kwargs):
    y = function(*inputs, **kwargs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "edges", "tiny", "shorter than the width"])
def test_each_document_is_convolved_alone(lengths, activation, bias, width):
    inputs = make_inputs(sum(lengths), width=width, bias=bias, dtype=torch.float64)
    got = run(causal_conv, inputs, activation=activation, sequences=Sequences.from_lengths(lengths))
    expected = run(conv_of_each_document, inputs, activation=activation, lengths=lengths)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_without_sequences_each_row_is_one_document():
    inputs = make_inputs(9, batch=3, dtype=torch.float64)
    for x, y in zip(run(causal_conv, inputs), run(conv_of_each_document, inputs, lengths=[9] * 3), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_rows_with_documents_of_their_own_and_padding():
    ids = torch.tensor([[1] * 5 + [2] * 2 + [0] * 3, [1] * 1 + [2] * 8 + [0] * 1])
    inputs = make_inputs(10, batch=2, dtype=torch.float64)
    got = run(causal_conv, inputs, sequences=Sequences.from_document_ids(ids))
    for x, y in zip(got, run(conv_of_each_document, inputs, lengths=[5, 2, 3, 1, 8, 1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_no_other_document():
    lengths = [5, 1, 2, 7]
    x, weight, bias = make_inputs(sum(lengths))
    y = causal_conv(x, weight, bias, sequences=Sequences.from_lengths(lengths))
    for document, packed in enumerate(y.split(lengths, 1)):
        (grad,) = torch.autograd.grad(packed.square().sum(), [x], retain_graph=True)
        reached = [bool(part.count_nonzero()) for part in grad.split(lengths, 1)]
        assert reached == [other == document for other in range(len(lengths))]


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_changing_a_document_leaves_the_others_bit_identical(value):
    sequences = Sequences.from_lengths([5, 2, 7])
    x, weight, bias = make_inputs(14)
    changed = x.detach().clone()
    changed[:, 5:7] = value
    before, after = (
        run(causal_conv, [x.requires_grad_(), weight, bias], sequences=sequences)[:2] for x in (x, changed)
    )
    for a, b in zip(before, after, strict=True):
        assert not torch.equal(a[:, 5:7], b[:, 5:7])
        assert torch.equal(a[:, :5], b[:, :5])
        assert torch.equal(a[:, 7:], b[:, 7:])


def test_bf16_is_rounded_once():
    inputs = [x.detach() for x in make_inputs(70, channels=64, dtype=torch.bfloat16)]
    got = causal_conv(*inputs)
    exact = causal_conv(*(x.float() for x in inputs))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16())


def test_non_contiguous_inputs():
    x, weight, bias = make_inputs(20)
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(causal_conv(strided, weight.T.contiguous().T, bias), causal_conv(x, weight, bias))


@pytest.mark.parametrize("activation", ["gelu", "swish", True])
def test_other_activations_are_refused(activation):
    with pytest.raises(ValueError, match="is not supported; expected one of 'silu', None"):
        causal_conv(*make_inputs(5), activation=activation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 6)}, r"x must have 3 dims; expected x \[B, T, D\], weight \[D, W\], bias \[D\]"),
        ({"weight": torch.zeros(6, 1, 4)}, "weight must have 2 dims"),
        ({"weight": torch.zeros(5, 4)}, "weight has D=5 where 6 is expected"),
        ({"bias": torch.zeros(4)}, "bias has D=4 where 6 is expected"),
        ({"x": torch.zeros(1, 5, 6, dtype=torch.int32)}, "x must be floating point"),
        ({"sequences": Sequences.from_lengths([4])}, r"describe 4 tokens but the input holds B\*T = 1\*5 = 5"),
        ({"impl": "cudnn"}, "unknown impl='cudnn'; expected 'auto' or one of 'triton', 'reference'"),
        ({"impl": "triton"}, "impl='triton' cannot run here: triton needs an NVIDIA GPU, the inputs are on cpu"),
        ({"split": [2, 3]}, r"split must hold widths that sum to D=6, got \[2, 3\]"),
        ({"split": [-2, 8]}, r"split must hold widths that sum to D=6, got \[-2, 8\]"),
        ({"split": []}, "split must hold widths that sum to D=6"),
        ({"l2norm": [2]}, "l2norm names a head width for each part of split; pass split too"),
        ({"split": [2, 4], "l2norm": [2]}, r"one head width, or 0, for each of the 2 parts, got \[2\]"),
        ({"split": [2, 4], "l2norm": [2, 3]}, r"heads of l2norm=\[2, 3\] must divide the parts of split=\[2, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    x, weight, bias = make_inputs(5)
    with pytest.raises(ValueError, match=message):
        causal_conv(**{"x": x, "weight": weight, "bias": bias} | change)


def test_the_choice_says_what_runs():
    choice = choose(CausalConvSpec(torch.device("cpu"), torch.float32))
    assert choice.impl == "reference"
    assert "plain torch on cpu" in choice.reason


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"dtype": torch.float64}, "the kernel takes bf16, fp16 and fp32, got torch.float64; cast the inputs or use"),
        ({"width": 9}, "the kernel takes widths up to 8, got 9; use impl='reference'"),
        ({"triton": False}, "triton is not installed; pip install triton or use impl='reference'"),
        ({}, None),
    ],
)
def test_what_the_kernel_takes_on_a_gpu(monkeypatch, options, refusal):
    monkeypatch.setattr(_nvidia, "_has_triton", lambda: options.get("triton", True))
    monkeypatch.setattr(torch.version, "hip", None)
    arguments = (torch.device("cuda"), options.get("dtype", torch.bfloat16))
    auto = choose(CausalConvSpec(*arguments, width=options.get("width")))
    assert auto.impl == ("triton" if refusal is None else "reference")
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            choose(CausalConvSpec(*arguments, width=options.get("width")), "triton")


SPLIT, HEADS = [4, 2], [2, 0]


def parts_of_each_document(x, weight, bias, *, lengths):
    first, second = conv_of_each_document(x, weight, bias, lengths=lengths).split(SPLIT, -1)
    heads = first.reshape(*first.shape[:-1], 2, 2)
    return (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).reshape(first.shape), second


def run_parts(function, inputs, **kwargs):
    parts = function(*inputs, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in parts]
    return [*(y.detach() for y in parts), *torch.autograd.grad(parts, inputs, weights)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "edges", "tiny", "shorter than the width"])
def test_parts_with_heads_normalised(lengths):
    inputs = make_inputs(sum(lengths), dtype=torch.float64)
    sequences = Sequences.from_lengths(lengths)
    got = run_parts(causal_conv, inputs, split=SPLIT, l2norm=HEADS, sequences=sequences)
    for x, y in zip(got, run_parts(parts_of_each_document, inputs, lengths=lengths), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_parts_are_contiguous_and_hold_the_same_bits_as_the_whole():
    inputs = make_inputs(20, dtype=torch.bfloat16)
    parts = causal_conv(*inputs, split=SPLIT)
    assert all(y.is_contiguous() for y in parts)
    assert torch.equal(torch.cat(parts, -1), causal_conv(*inputs))


def test_heads_are_normalised_before_the_only_rounding():
    inputs = [x.detach() for x in make_inputs(70, dtype=torch.bfloat16)]
    got = causal_conv(*inputs, split=SPLIT, l2norm=HEADS)
    exact = causal_conv(*(x.float() for x in inputs), split=SPLIT, l2norm=HEADS)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(got, exact, strict=True))


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    return torch.compile(causal_conv, fullgraph=True, backend="aot_eager")


def test_compiles_whole_and_only_once_for_any_documents(compiled):
    inputs, options = make_inputs(83), {"split": SPLIT, "l2norm": HEADS}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 1, 70, 7], [83], [1] * 83):
            sequences = Sequences.from_lengths(lengths)
            got = run_parts(compiled, inputs, sequences=sequences, **options)
            for x, y in zip(got, run_parts(causal_conv, inputs, sequences=sequences, **options), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_compiled_gradient_reaches_no_other_document(compiled):
    inputs, sequences = make_inputs(83), Sequences.from_lengths([40, 43])
    parts = compiled(*inputs, sequences=sequences, split=SPLIT, l2norm=HEADS)
    (grad,) = torch.autograd.grad(sum(y[:, 40:].sum() for y in parts), inputs[:1])
    assert grad[:, 40:].count_nonzero() > 0
    assert grad[:, :40].count_nonzero() == 0


def fake_step(weight_grad):
    """Forward and backward of the kernel's op, which nothing here could run."""
    x = torch.empty(2, 9, 6, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(6, 4, requires_grad=weight_grad)
    positions = torch.empty(18, dtype=torch.int32)
    parts = op.causal_conv(x, weight, None, positions, SPLIT, [0, 0], True)
    torch.autograd.backward(parts, [torch.empty_like(y) for y in parts])
    return x, weight, parts


def test_the_kernel_traces_where_it_cannot_run():
    with FakeTensorMode():
        x, weight, parts = fake_step(weight_grad=True)
    assert [(list(y.shape), y.dtype) for y in parts] == [([2, 9, size], torch.bfloat16) for size in SPLIT]
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, weight.dtype)


@pytest.mark.parametrize(("weight_grad", "products"), [(True, 4), (False, 3)])
def test_a_frozen_convolution_costs_a_product_less(weight_grad, products):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        _, weight, _ = fake_step(weight_grad)
    assert counter.get_total_flops() == products * 2 * 18 * 6 * 4
    assert weight.grad is None or weight_grad


# what stands before a sequence


def halves(x, cut, width):
    """Both pieces of each row of x, and what the second one has on its left."""
    before = torch.cat([x.new_zeros(x.shape[0], width - 1, x.shape[2]), x[:, :cut]], 1)[:, cut : cut + width - 1]
    return x[:, :cut], x[:, cut:], before


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 63, 64, 65])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("split", [None, [4, 2]])
def test_two_pieces_with_what_stands_before_equal_the_whole(cut, width, split):
    x, weight, bias = (t.double().detach().requires_grad_() for t in make_inputs(66, width=width))
    options = {"split": split, "l2norm": None if split is None else [2, 0]}
    joined = [causal_conv(x, weight, bias, **options)]
    first, second, left = halves(x, cut, width)
    pieces = [causal_conv(first, weight, bias, **options), causal_conv(second, weight, bias, left=left, **options)]
    if split is not None:
        joined = list(joined[0])
        pieces = [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]
    else:
        pieces = [torch.cat(pieces, 1)]
    weights = [torch.randn_like(y) for y in joined]
    for y, piece in zip(joined, pieces, strict=True):
        torch.testing.assert_close(piece, y)
    expected = torch.autograd.grad(joined, (x, weight, bias), weights)
    for found, wanted in zip(torch.autograd.grad(pieces, (x, weight, bias), weights), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_each_sequence_has_its_own_left_and_empty_ones_none_of_it():
    lengths, width = [2, 0, 1, 5, 0], 4
    sequences = Sequences.from_lengths(lengths, total=10, capacity=8)
    x, weight, bias = (t.double().detach() for t in make_inputs(10, width=width))
    left = torch.randn(6, 3, x.shape[2], dtype=torch.float64)
    left[[1, 4]] = float("nan")  # of the empty sequences
    left.requires_grad_()
    got = causal_conv(x, weight, bias, sequences=sequences, left=left)
    starts = [0, 2, 2, 3, 8, 8]
    for number, (start, length) in enumerate(zip(starts, [*lengths, 2], strict=True)):
        part = torch.cat([left[number : number + 1], x[:, start : start + length]], 1)
        if length:
            expected = causal_conv(part, weight, bias)[:, width - 1 :]
            torch.testing.assert_close(got[:, start : start + length], expected)
    (grad,) = torch.autograd.grad(got[:, 3:8].sum(), left)
    assert grad[3].any()
    assert not grad[[0, 1, 2, 4, 5]].any()


def test_the_gradient_of_what_stands_before():
    x, weight, bias = (t.double().detach().requires_grad_() for t in make_inputs(7, batch=2, width=3))
    left = torch.randn(2, 2, x.shape[2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t[:3], left=t[3]), (x, weight, bias, left))


def test_what_stands_before_is_traceable():
    x, weight, bias = (t.detach() for t in make_inputs(8))
    left = torch.randn(4, 3, x.shape[2])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def conv(x, left, sequences):
        return causal_conv(x, weight, bias, sequences=sequences, left=left)

    for i, lengths in enumerate(([3, 5], [1, 1, 1, 5])):
        sequences = Sequences.from_lengths(lengths, capacity=4).static()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = conv(x, left, sequences)
        torch.testing.assert_close(found, causal_conv(x, weight, bias, sequences=sequences, left=left))


def test_what_stands_before_must_fit():
    x, weight, bias = make_inputs(5)
    with pytest.raises(ValueError, match=r"left must be \[number of sequences, W - 1, D\] = \[1, 3, 6\], got"):
        causal_conv(x, weight, bias, left=torch.zeros(1, 2, x.shape[2]))
    with pytest.raises(ValueError, match=r"= \[2, 3, 6\], got \[1, 3, 6\]"):
        causal_conv(x, weight, bias, left=torch.zeros(1, 3, 6), sequences=Sequences.from_lengths([2, 3]))


def test_the_kernel_refuses_what_stands_before(monkeypatch):
    monkeypatch.setattr(_nvidia, "_has_triton", lambda: True)
    spec = CausalConvSpec(torch.device("cuda"), torch.float16, width=4, left=True)
    assert choose(spec).impl == "reference"
    with pytest.raises(ValueError, match="it takes no left; use impl='reference'"):
        choose(spec, "triton")
