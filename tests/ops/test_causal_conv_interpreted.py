"""The Triton kernels in Triton's interpreter, against the reference in float64; test_interpreted.py runs them."""

import math
import os

import pytest
import torch

from deltatune.ops._causal_conv import launch, op, reference
from deltatune.packing.sequences import Sequences

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set by test_interpreted.py"
)
TILES = ("FORWARD", "FORWARD_HEADS", "BACKWARD", "BACKWARD_HEADS", "WEIGHT_GRAD")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Several programs along the tokens of a tiny stream, and several groups of tokens in each."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        for name in TILES:
            monkeypatch.setattr(launch, name, launch.Tile(rows=4, unroll=2))
        monkeypatch.setattr(launch, "WEIGHT_GRAD", launch.Tile(rows=6, unroll=3))


def make_inputs(tokens, *, batch=1, channels=8, width=4, bias=True, dtype=torch.float32):
    shapes = [(batch, tokens, channels), (channels, width)] + [(channels,)] * bias
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def positions_of(lengths):
    return Sequences.from_lengths(lengths).positions


def run(function, inputs, positions, split, l2norm, activation="silu"):
    """The parts and the gradients of a weighted sum of them."""
    x, weight, bias = [*inputs, None][:3]
    parts = function(x, weight, bias, positions, split, l2norm, activation)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in parts]
    return [*(y.detach() for y in parts), *torch.autograd.grad(parts, inputs, grads)]


def kernel(x, weight, bias, positions, split, l2norm, activation):
    return op.causal_conv(x, weight, bias, positions, split, l2norm, activation == "silu")


def specification(x, weight, bias, positions, split, l2norm, activation):
    return reference.causal_conv(x, weight, bias, activation, positions, split, l2norm)


def assert_right(inputs, positions, split, l2norm=None, activation="silu", tolerance=1e-6):
    arguments = (positions, split, l2norm or [0] * len(split), activation)
    got = run(kernel, inputs, *arguments)
    exact = run(specification, [x.detach().double().requires_grad_() for x in inputs], *arguments)
    for a, b in zip(got, exact, strict=True):
        assert ((a - b).norm() <= tolerance * b.norm()).item()


@interpreted
def test_documents_at_the_edges_of_programs_and_padding():
    """Programs begin at every fourth and every sixth token; some groups of tokens are deep inside a document."""
    lengths = [1, 2, 2, 1, 7, 1, 2, 9, 1, 3]
    assert_right(make_inputs(sum(lengths)), positions_of(lengths), [8])


@interpreted
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_widths_without_bias_and_activation(width):
    assert_right(make_inputs(13, width=width, bias=False), positions_of([3, 1, 2, 7]), [8], activation=None)


@interpreted
@pytest.mark.parametrize("l2norm", [[0, 0, 0], [4, 4, 0]])
def test_parts_and_heads(l2norm):
    assert_right(make_inputs(7, channels=18), positions_of([2, 1, 4]), [8, 4, 6], l2norm)


@interpreted
def test_a_part_wider_than_a_block_and_an_empty_one():
    assert_right(make_inputs(3, channels=150), positions_of([2, 1]), [140, 0, 10])


@interpreted
def test_half_precision():
    assert_right(make_inputs(9, dtype=torch.float16), positions_of([3, 1, 5]), [8], [8], tolerance=2**-11)


@interpreted
def test_rows_of_a_wider_projection():
    x, weight, bias = make_inputs(4, batch=2)
    wide = torch.full((2, 4, 19), math.nan)
    wide[..., 8:16] = x.detach()
    view = wide[..., 8:16].requires_grad_()
    positions = positions_of([3, 1, 2, 2])
    got, expected = (run(kernel, [y, weight, bias], positions, [8], [0]) for y in (view, x))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    got = run(kernel, [turned, weight, bias], positions, [8], [0])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert_right([view, weight, bias], positions, [8])


@interpreted
def test_gradients_that_are_expanded_or_missing():
    x, weight, bias = make_inputs(5)
    options = (positions_of([2, 3]), [4, 4], [0, 0], True)
    first, second = op.causal_conv(x, weight, bias, *options)
    ones, zeros = torch.ones_like(first), torch.zeros_like(first)
    expected = torch.autograd.grad((first, second), (x, weight, bias), (zeros, ones), retain_graph=True)
    got = torch.autograd.grad(second.sum(), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


LENGTHS = [2, 1, 3, 1, 4]  # of documents, so that each has another on every side


def assert_same_outside(own, got, expected):
    """The same bits in every document but these."""
    for document, (a, b) in enumerate(zip(got.split(LENGTHS, 1), expected.split(LENGTHS, 1), strict=True)):
        assert torch.equal(a, b) != (document in own)


@interpreted
@pytest.mark.parametrize("own", [(0, 2, 4), (1, 3)])
def test_what_is_not_finite_stays_inside_its_document(own):
    x, weight, bias = make_inputs(11)
    changed = x.detach().clone()
    for document, value in zip(own, (math.nan, math.inf, -math.inf), strict=False):
        changed.split(LENGTHS, 1)[document].fill_(value)
    options = (positions_of(LENGTHS), [8], [0])
    before = run(kernel, [x, weight, bias], *options)
    after = run(kernel, [changed.requires_grad_(), weight, bias], *options)
    for a, b in zip(after[:2], before[:2], strict=True):
        assert_same_outside(own, a, b)


@interpreted
@pytest.mark.parametrize("l2norm", [0, 8])
def test_a_gradient_that_is_nan_stays_inside_its_document(l2norm):
    x, weight, bias = make_inputs(11)
    (y,) = op.causal_conv(x, weight, bias, positions_of(LENGTHS), [8], [l2norm], True)
    grads = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, [x], grads, retain_graph=True)
    for own in ((0, 2, 4), (1, 3)):
        poisoned = grads.clone()
        for document in own:
            poisoned.split(LENGTHS, 1)[document].fill_(math.nan)
        (got,) = torch.autograd.grad(y, [x], poisoned, retain_graph=True)
        assert_same_outside(own, got, expected)
        assert all(got.split(LENGTHS, 1)[document].isnan().all() for document in own)


@interpreted
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(monkeypatch, bias):
    for name in TILES:
        monkeypatch.setattr(launch, name, launch.Tile(rows=2, unroll=1))
    inputs = [*make_inputs(2, width=2, bias=bias), None][:3]
    options = (positions_of([1, 1]), [4, 4], [4, 0], True)
    torch.library.opcheck(torch.ops.deltatune.causal_conv.default, (*inputs, *options))
    detached = [None if x is None else x.detach() for x in inputs]
    grads = [torch.randn(1, 2, 4), None]
    for wanted in ((True, bias), (False, False)):
        arguments = (grads, *detached, *options, *wanted)
        torch.library.opcheck(torch.ops.deltatune.causal_conv_backward.default, arguments)


@interpreted
def test_compiles_whole_and_only_once_for_any_documents():
    inputs = make_inputs(3)

    def whole(x, weight, bias, positions):
        return run_parts(x * 2, weight, bias, positions)

    def run_parts(x, weight, bias, positions):
        return op.causal_conv(x, weight, bias, positions, [4, 4], [0, 0], True)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([1, 2], [3], [1] * 3):
            got, expected = (
                [*y, *torch.autograd.grad([part.sum() for part in y], inputs)]
                for y in (f(*inputs, positions_of(lengths)) for f in (compiled, whole))
            )
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@interpreted
def test_no_tokens():
    x, weight, bias = make_inputs(0)
    (y,) = op.causal_conv(x, weight, bias, positions_of([0]), [8], [0], True)
    y.sum().backward()
    assert x.grad.shape == (1, 0, 8)
    assert weight.grad.count_nonzero() == bias.grad.count_nonzero() == 0


@interpreted
def test_a_frozen_convolution_computes_no_weight_gradient():
    x, weight, bias = (y.detach() for y in make_inputs(3))
    options = (positions_of([3]), [8], [0], True)
    grads = [torch.ones(1, 3, 8)]
    backward = torch.ops.deltatune.causal_conv_backward
    shapes = {
        wanted: [list(y.shape) for y in backward(grads, x, weight, bias, *options, *wanted)]
        for wanted in ((False, False), (True, False), (False, True))
    }
    assert shapes[False, False] == [[1, 3, 8], [0, 4], [0]]
    assert shapes[True, False] == [[1, 3, 8], [8, 4], [0]]
    assert shapes[False, True] == [[1, 3, 8], [0, 4], [8]]


@interpreted
def test_a_second_derivative_is_refused():
    x, weight, bias = make_inputs(3)
    (y,) = op.causal_conv(x, weight, bias, positions_of([3]), [8], [0], True)
    (grad,) = torch.autograd.grad(y.sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches nothing")
@pytest.mark.parametrize("tokens", [100, 5_000_000])
def test_any_number_of_tokens_fits_a_grid(monkeypatch, tokens):
    """The first axis of a grid ends at 2^31 - 1, the others at 65535."""
    pytest.importorskip("triton", reason="needs triton")
    from deltatune.ops._causal_conv import kernel, launch

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(kernel, "forward_kernel", Recorder())
    monkeypatch.setattr(kernel, "backward_kernel", Recorder())
    monkeypatch.setattr(launch, "FORWARD", launch.Tile(rows=64, unroll=8))
    x, weight = torch.zeros(1, tokens, 2, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.float16)
    positions = torch.zeros(tokens, dtype=torch.int32)
    options = (x, weight, None, positions, [2], [0], True)
    (y,) = op.causal_conv(*options)
    torch.ops.deltatune.causal_conv_backward([y], *options, False, False)
    assert len(grids) == 2
    for grid in grids:
        assert all(size <= 65535 for size in grid[1:])
        assert grid[0] >= tokens // 128
