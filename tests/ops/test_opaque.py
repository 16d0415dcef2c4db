"""Registration of ops in one place: what autograd records, what is refused, what is kept."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from deltatune import ops
from deltatune.ops._linear_cross_entropy import torch_chunked
from deltatune.ops._opaque import first_order, first_order_backward, opaque


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def delta_rule(impl: str) -> tuple[Tensor, list[Tensor]]:
    q, k, v, g, beta = _leaves((1, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2), (1, 5, 2))
    return ops.gated_delta_rule(q, k, v, -g.exp(), beta.sigmoid(), impl=impl), [q, k, v, g, beta]


def attention(impl: str) -> tuple[Tensor, list[Tensor]]:
    inputs = _leaves((1, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4))
    return ops.varlen_attention(*inputs, impl=impl), inputs


def loss(impl: str, reduction: str = "sum") -> tuple[Tensor, list[Tensor]]:
    inputs = _leaves((6, 8), (11, 8))
    labels = torch.tensor([0, 3, -100, 10, 3, 5])
    return ops.linear_cross_entropy(*inputs, labels, reduction=reduction, impl=impl), inputs


needs_chunked = pytest.mark.skipif(torch_chunked.missing() is not None, reason=torch_chunked.missing() or "")
REFUSING = [
    pytest.param(delta_rule, {"impl": "reference"}, id="gated_delta_rule"),
    pytest.param(attention, {"impl": "reference"}, id="varlen_attention"),
    pytest.param(loss, {"impl": "reference"}, id="linear_cross_entropy-reference"),
    pytest.param(loss, {"impl": "reference", "reduction": "mean"}, id="linear_cross_entropy-mean"),
    pytest.param(loss, {"impl": "reference", "reduction": "none"}, id="linear_cross_entropy-none"),
    pytest.param(loss, {"impl": "torch"}, id="linear_cross_entropy-torch", marks=needs_chunked),
    pytest.param(
        loss, {"impl": "torch", "reduction": "mean"}, id="linear_cross_entropy-torch-mean", marks=needs_chunked
    ),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("op", "options"), REFUSING)
def test_a_second_derivative_is_refused_to_every_input(op, options, weighted):
    """Also where the gradient that comes in is a constant, and where another term of the penalty has one."""
    y, inputs = op(**options)
    weights = torch.ones_like(y).requires_grad_(weighted)
    first = torch.autograd.grad((y * weights).sum(), inputs, create_graph=True)
    for x in inputs:
        penalty = sum(grad.square().sum() for grad in first) + x.square().sum()
        with pytest.raises(RuntimeError, match=r"no second derivative; call backward\(\) without create_graph"):
            torch.autograd.grad(penalty, x, retain_graph=True)


@pytest.mark.parametrize(("op", "options"), REFUSING)
def test_a_graph_that_nobody_differentiates_twice_gives_the_gradients(op, options):
    y, inputs = op(**options)
    plain = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    for found, expected in zip(torch.autograd.grad(y.sum(), inputs, create_graph=True), plain, strict=True):
        assert torch.equal(found, expected)


def test_plain_torch_references_are_right_in_second_order():
    x, weight = _leaves((1, 6, 3), (3, 4))
    gate, scale = _leaves((1, 6, 3), (3,))
    assert torch.autograd.gradgradcheck(lambda x, w: ops.causal_conv(x, w, impl="reference"), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *t: ops.gated_rms_norm(*t, eps=1e-6, impl="reference"), (x, gate, scale))
    heads, scale, angles = *_leaves((1, 3, 2, 4), (4,)), torch.randn(1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, w: ops.rms_norm_rope(x, w, angles.cos(), angles.sin(), eps=1e-6, impl="reference"), (heads, scale)
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_a_grouped_linear_cannot_be_differentiated(frozen):
    x, weight = _leaves((6, 4), (2, 3, 4))
    y = ops.grouped_linear(x, weight.detach() if frozen else weight, torch.tensor([2, 6], dtype=torch.int32))
    (first,) = torch.autograd.grad(y.square().sum(), x if frozen else weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"grouped_linear has no second derivative.*detach its input and its adapt"):
        torch.autograd.grad(first.sum() + x.square().sum(), x)


def test_the_refusal_keeps_nothing_of_the_inputs():
    hidden, weight = _leaves((64, 8), (11, 8))
    grown = hidden * 2
    kept = weakref.ref(grown.untyped_storage())
    found = first_order("op", (grown @ weight.T).detach().sum().requires_grad_(), grown, weight)
    del grown
    assert kept() is None
    assert found.requires_grad


def test_a_result_behind_the_refusal_may_be_changed_in_place():
    y, (hidden, _) = loss("reference")
    y /= 2
    y.backward()
    expected, (again, _) = loss("reference")
    expected.backward()
    assert torch.equal(hidden.grad, again.grad / 2)


def test_a_compiled_loss_is_one_graph():
    hidden, weight = _leaves((6, 8), (11, 8))
    labels = torch.tensor([0, 3, -100, 10, 3, 5])

    def function(hidden, weight):
        return ops.linear_cross_entropy(2 * hidden, weight, labels, impl="reference")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(function(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(x, y)


# an op of the test's own, whose backward is plain torch


def _double_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _double_setup(ctx, inputs, output):
    del output
    ctx.save_for_backward(*inputs)


@opaque(fake=_double_fake, setup_context=_double_setup, backward=lambda ctx, grad: 2 * grad * ctx.saved_tensors[0])
def test_only_square(x: Tensor) -> Tensor:
    return x @ torch.eye(x.shape[-1]) * x


@opaque(fake=lambda xs, y: [x.new_empty(x.shape) for x in xs], gradient_of="listed")
def test_only_listed(xs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    return [x * y for x in xs]


@opaque(fake=lambda xs: xs[0].new_empty(xs[0].shape))
def test_only_summed(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] @ torch.eye(xs[0].shape[-1]) + xs[1]


# pytest would take them for tests
square, listed, summed = test_only_square, test_only_listed, test_only_summed
del test_only_square, test_only_listed, test_only_summed


def test_autograd_sees_an_op_as_any_other():
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(square, (x,))
    (grad,) = torch.autograd.grad(square(x).sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())
    with torch.no_grad():
        assert not square(x).requires_grad
    assert not square(x.detach()).requires_grad


def test_inside_a_compiled_graph_nothing_is_recorded():
    """The graph's own Function is what autograd sees; another one for each op would cost as much as a launch."""
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(lambda x: square(x).sum(), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(compiled(x), x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        (found,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(found, expected)
    names = [event.name for event in trace.events()]
    assert any("test_only_square" in name for name in names)
    assert not any("Recorded" in name for name in names)


def test_autocast_is_off_inside():
    x = torch.randn(3, 4) * (1 + 2**-12)
    expected = square(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = square(x)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_autocast_is_off_inside_an_op_of_a_list_alone():
    x = torch.randn(3, 4) * (1 + 2**-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(summed([x, x]), 2 * x)


def by_default(x: Tensor, scale: float = 2.0) -> Tensor:
    return x * scale


def by_keyword(x: Tensor, *, scale: float) -> Tensor:
    return x * scale


@pytest.mark.parametrize("kernel", [by_default, by_keyword])
def test_arguments_that_a_function_would_not_see_are_refused(kernel):
    with pytest.raises(TypeError, match=f"{kernel.__name__}: arguments .* have no default; change 'scale'"):
        opaque(fake=_double_fake)(kernel)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    @first_order_backward("product")
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return torch.addmm(grad, grad, weight.T), None


@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_around_a_backward_is_off_inside(create_graph):
    """Where it is on, a product rounds its operands, and a sum with one has two dtypes."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
    (expected,) = torch.autograd.grad(_Product.apply(x, weight).sum(), x)
    y = _Product.apply(x, weight).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y, x, create_graph=create_graph)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_tensors_in_lists_are_refused_too():
    xs, y = [torch.randn(3, requires_grad=True), torch.randn(3)], torch.randn(3)
    first, _ = listed(xs, y)
    with pytest.raises(RuntimeError, match="listed has no second derivative"):
        first.sum().backward()


def test_an_op_costs_no_flops_unless_it_says_so():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        square(torch.randn(3, 4))
        F.linear(torch.randn(2, 4), torch.randn(5, 4))
    assert counter.get_total_flops() == 2 * 2 * 4 * 5


@pytest.mark.parametrize("impl", ["reference", pytest.param("torch", marks=needs_chunked)])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_by_the_loss(impl, grad):
    """Also where reverse mode is off, which says nothing about tangents."""
    (hidden, weight), labels = _leaves((6, 8), (11, 8)), torch.tensor([0, 3, -100, 10, 3, 5])
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(NotImplementedError):
        ops.linear_cross_entropy(forward_ad.make_dual(hidden.detach(), hidden.detach()), weight, labels, impl=impl)
