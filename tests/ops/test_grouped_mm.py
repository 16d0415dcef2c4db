import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import quack_stand_in
from deltatune.ops._grouped_mm import quack_grouped
from deltatune.ops._grouped_mm.api import grouped_linear
from deltatune.ops._grouped_mm.experts import ExpertLinear, moe_experts
from deltatune.ops._grouped_mm.providers import GroupedMmSpec
from deltatune.ops._registry import Support, choose

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"mixed": [5, 1, 0, 70, 7], "first empty": [0, 33, 32], "one": [64], "all empty": [0, 0]}


def inputs(sizes: list[int], width=24, out=40, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), out, width, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(sizes).cumsum(0).int()


def oracle(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    products = [x[a:b].double() @ w.double().T for a, b, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat(products)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_equals_a_product_per_group(sizes, dtype, tolerance):
    x, weight, offsets = inputs(sizes, dtype=dtype)
    found, expected = grouped_linear(x, weight, offsets), oracle(x, weight, offsets)
    assert_close(found, expected, tolerance)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, weight), grad)
    for got, want in zip(grads, torch.autograd.grad(expected, (x, weight), grad.double()), strict=True):
        assert got.dtype == dtype
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(24, 40), (64, 33), (100, 17), (257, 128), (512, 96)])
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(dtype, width, out):
    x, weight, _ = inputs([70], width, out, dtype=dtype)
    x, weight = x.detach(), weight.detach()

    def row_and_gradient(before: int, after: int) -> tuple[Tensor, Tensor]:
        rows = torch.cat([x[:before], x[69:], x[before : before + after]]).requires_grad_()
        y = grouped_linear(rows, weight, torch.tensor([rows.shape[0]], dtype=torch.int32))
        (grad,) = torch.autograd.grad(y.square().sum(), rows)
        return y[before], grad[before]

    alone = row_and_gradient(0, 0)
    for before, after in ((0, 1), (1, 0), (5, 40), (31, 0), (32, 5), (60, 7)):
        for got, want in zip(row_and_gradient(before, after), alone, strict=True):
            assert torch.equal(got, want)


def test_a_frozen_weight_costs_no_gradient_and_keeps_no_rows():
    x, weight, offsets = inputs([5, 9])
    weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = grouped_linear(x, weight, offsets)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert x.shape not in kept
    assert counter.get_total_flops() == 2 * 14 * 24 * 40


def test_flops():
    x, weight, offsets = inputs([5, 9])
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x, weight, offsets).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 14 * 24 * 40


def test_opcheck():
    x, weight, offsets = (t.detach() for t in inputs([5, 0, 4]))
    narrow, up = torch.randn(9, 16), torch.randn(3, 40, 16)
    ops = torch.ops.deltatune
    for low in ((None, None), (narrow, up)):
        torch.library.opcheck(ops.grouped_mm.default, (x, weight, offsets, *low, "reference"))
    grad = torch.randn(x.shape[0], weight.shape[1])
    torch.library.opcheck(ops.grouped_gram.default, (grad, x, offsets, torch.float32, "reference"))


def test_non_contiguous_inputs():
    x, weight, offsets = inputs([5, 9])
    assert_close(
        grouped_linear(x[:, ::2], weight[..., ::2], offsets), oracle(x[:, ::2], weight[..., ::2], offsets), 1e-6
    )
    y = grouped_linear(x, weight.mT.contiguous().mT, offsets)
    assert torch.equal(y, grouped_linear(x, weight, offsets))
    y.sum().backward()  # an expanded gradient


def test_autocast_casts_the_inputs_and_nothing_inside():
    x, weight, offsets = inputs([5, 9])
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, offsets)
    assert torch.equal(y, grouped_linear(x.bfloat16(), weight.bfloat16(), offsets))


def test_bad_arguments():
    x, weight, offsets = inputs([5, 9])
    with pytest.raises(ValueError, match="expected x"):
        grouped_linear(x[:, :3], weight, offsets)
    with pytest.raises(ValueError, match="expected x"):
        grouped_linear(x, weight, offsets[:1])
    with pytest.raises(ValueError, match="must be int32"):
        grouped_linear(x, weight, offsets.long())
    with pytest.raises(ValueError, match="share a dtype"):
        grouped_linear(x.half(), weight, offsets)
    with pytest.raises(ValueError, match=r"expected at most 14, got \[6, 15\]"):
        grouped_linear(x, weight, offsets + 1)
    with pytest.raises(ValueError, match="must not decrease"):
        grouped_linear(x, weight, offsets.flip(0))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        grouped_linear(x, weight, offsets, impl="torch")
    assert "NVIDIA GPU" in choose(GroupedMmSpec(torch.device("cpu"), torch.bfloat16)).reason


# T tokens, k experts a token goes to, X experts, H hidden width, I width of an expert


def mixture(tokens=50, top_k=3, experts=8, hidden=32, inner=24, dtype=torch.float32, device="cpu") -> tuple:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(device)
    weights = torch.rand(tokens, top_k, generator=generator).to(device, dtype).requires_grad_()
    gate_up = (torch.randn(experts, 2 * inner, hidden, generator=generator) * 0.2).to(device, dtype).requires_grad_()
    down = (torch.randn(experts, hidden, inner, generator=generator) * 0.2).to(device, dtype).requires_grad_()
    return x, index, weights, gate_up, down


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_of(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return moe_experts(x, index, weights, ExpertLinear(gate_up), ExpertLinear(down), swiglu)


def expert_by_expert(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x, weights, gate_up, down = (t.double() for t in (x, weights, gate_up, down))
    y = torch.zeros_like(x)
    for expert in range(down.shape[0]):
        gate, up = (x @ gate_up[expert].T).chunk(2, dim=-1)
        share = (weights * (index == expert)).sum(-1, keepdim=True)
        y = y + share * ((F.silu(gate) * up) @ down[expert].T)
    return y


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(50, 3, 8), (1, 2, 4), (65, 1, 1), (63, 4, 4), (7, 2, 64)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_experts_equal_one_expert_after_the_other(tokens, top_k, experts, dtype, tolerance):
    arguments = mixture(tokens, top_k, experts, dtype=dtype)
    trained = [arguments[i] for i in (0, 2, 3, 4)]
    found, expected = experts_of(*arguments), expert_by_expert(*arguments)
    assert found.dtype == dtype
    assert_close(found, expected, tolerance)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, trained, grad)
    for got, want in zip(grads, torch.autograd.grad(expected, trained, grad.double()), strict=True):
        assert_close(got, want, tolerance)


@pytest.mark.parametrize(("compiled", "threads"), [(False, 1), (False, 2), (True, 2)])
def test_other_tokens_and_their_routing_change_no_bit(compiled, threads):
    """Enough elements that elementwise loops are split between threads, in the middle of a row."""
    experts = torch.compile(experts_of, fullgraph=True) if compiled else experts_of
    x, index, weights, gate_up, down = (t.detach() for t in mixture(451, inner=56))
    kept = torch.rand(451) < 0.6
    frozen_threads = torch.get_num_threads()
    torch.set_num_threads(threads)

    def result_and_gradients(x: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(x, index, weights, gate_up, down)
        return [t[kept] for t in (y, *torch.autograd.grad(y.square().sum(), (x, weights)))]

    try:
        before = result_and_gradients(x, index, weights)
        for expert in (0, 5):
            other_x, other_index = x.clone(), index.clone()
            other_x[~kept] = float("nan")
            other_index[~kept] = torch.tensor([expert, 1, 2])
            for old, new in zip(before, result_and_gradients(other_x, other_index, weights), strict=True):
                assert torch.equal(old, new)
    finally:
        torch.set_num_threads(frozen_threads)


def test_experts_in_one_graph_whatever_the_routing():
    x, _, weights, gate_up, down = mixture()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, index, weights):
        return checkpoint(experts_of, 2 * x, index, weights, gate_up, down, use_reentrant=False)

    routings = [
        torch.rand(50, 8).topk(3).indices,
        torch.tensor([[7, 0, 1]]).expand(50, 3),
        torch.arange(3).expand(50, 3),
    ]
    for i, index in enumerate(r.contiguous() for r in routings):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = layer(x, index, weights)
            grads = torch.autograd.grad(found.square().sum(), (x, weights, gate_up, down))
        expected = expert_by_expert(2 * x, index, weights, gate_up, down)
        assert_close(found, expected, 2e-6)
        wanted = torch.autograd.grad(expected.square().sum(), (x, weights, gate_up, down))
        for got, want in zip(grads, wanted, strict=True):
            assert_close(got, want, 5e-6)


def test_experts_that_do_not_fit():
    x, index, weights, gate_up, down = mixture()
    with pytest.raises(ValueError, match=r"expected gate to make rows of 24.*from rows of 46"):
        experts_of(x, index, weights, gate_up[:, 2:], down)
    with pytest.raises(ValueError, match="expected hidden"):
        experts_of(x, index[1:], weights, gate_up, down)


@pytest.mark.parametrize("impl", [pytest.param(i, marks=CUDA) for i in ("torch", "quack", "reference")])
def test_cuda_grouped_mm(impl):
    if impl == "quack":
        pytest.importorskip("quack")
    sizes = [5, 1, 0, 70, 7, 300]
    x, weight, offsets = (t.detach().cuda() for t in inputs(sizes, 64, 128, dtype=torch.bfloat16))
    x.requires_grad_()
    weight.requires_grad_()
    found, expected = grouped_linear(x, weight, offsets, impl=impl), oracle(x, weight, offsets)
    assert choose(GroupedMmSpec(torch.device("cuda"), torch.bfloat16, weight_shape=weight.shape)).impl == "torch"
    assert_close(found, expected, 4e-3)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, weight), grad)
    for got, want in zip(grads, torch.autograd.grad(expected, (x, weight), grad.double()), strict=True):
        assert_close(got, want, 4e-3)
    found = grouped_linear(x, weight, offsets, impl=impl)
    found.sum().backward()  # an expanded gradient
    assert not weight.grad[2].any()


@pytest.mark.parametrize("sizes", [pytest.param(s, marks=CUDA) for s in ([0, 0, 0], [300], [0, 1, 0, 2], [129, 127])])
@pytest.mark.parametrize(("width", "out"), [(72, 64), (64, 136)])
@pytest.mark.parametrize("transposed", [False, True])
def test_cuda_quack_multiplies_groups_of_any_size(sizes, width, out, transposed):
    """The last rows belong to no group; the stream is not the default one."""
    pytest.importorskip("quack")
    x, weight, offsets = (t.detach().cuda() for t in inputs([*sizes, 5], width, out, dtype=torch.bfloat16))
    weight, offsets = weight[:-1], offsets[:-1]
    weight = weight.mT.contiguous().mT if transposed else weight
    x[-5:] = float("nan")
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = grouped_linear(x, weight, offsets, impl="quack")
        (grad,) = torch.autograd.grad(found.square().sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    assert not found[-5:].any()
    assert not grad[-5:].any()
    if sum(sizes):
        expected = oracle(x[:-5], weight, offsets)
        assert_close(found[:-5], expected, 4e-3)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        assert_close(grad[:-5], wanted[:-5], 1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_quack_multiplies_frozen_weights(monkeypatch, transposed):
    """By a stand-in that leaves NaN where quack writes nothing."""
    quack_stand_in.install(monkeypatch)
    quack = next(provider for provider in GroupedMmSpec.providers if provider.name == "quack")
    runs = replace(quack, supports=lambda _: Support(True, "a stand-in"))
    monkeypatch.setattr(GroupedMmSpec, "providers", (runs,))
    x, weight, offsets = inputs([5, 0, 70, 7], 64, 72)
    weight = weight.detach().mT.contiguous().mT if transposed else weight.detach()
    rows = torch.cat([x, torch.full((3, 64), float("nan"))])  # absent ones
    found, expected = grouped_linear(rows, weight, offsets, impl="quack"), oracle(x, weight, offsets)
    assert_close(found[:-3], expected, 1e-6)
    assert not found[-3:].any()
    (grad,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, expected))
    assert_close(grad, wanted, 1e-6)


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "version", "message"),
    [
        ((9, 0), torch.bfloat16, (4, 16, 8), "0.6.5", None),
        ((9, 0), torch.float16, (4, 16, 8), "0.7", None),
        ((8, 0), torch.bfloat16, (4, 16, 8), "0.6.5", "needs compute capability 9.0, this GPU has 8.0"),
        ((9, 0), torch.float32, (4, 16, 8), "0.6.5", "takes bfloat16 and float16, not torch.float32"),
        ((9, 0), torch.bfloat16, (4, 16, 12), "0.6.5", r"multiples of 8, got a weight \[4, 16, 12\]"),
        ((9, 0), torch.bfloat16, (4, 16, 8), "0.6.4", "0.6.4 is older than 0.6.5: pip install"),
        ((9, 0), torch.bfloat16, (4, 16, 8), None, "is not installed: pip install"),
    ],
)
def test_what_quack_takes(monkeypatch, capability, dtype, shape, version, message):
    monkeypatch.setattr(quack_grouped, "gpu_refusal", lambda *_: None)
    monkeypatch.setattr(quack_grouped, "capability_of", lambda _: capability)
    monkeypatch.setattr(quack_grouped, "version_of", lambda _: version and Version(version))
    found = quack_grouped.refusal(torch.device("cuda"), dtype, torch.Size(shape))
    assert found is None if message is None else re.search(message, found)


@pytest.mark.parametrize("compiled", [pytest.param(c, marks=CUDA) for c in (False, True)])
def test_cuda_experts(compiled):
    arguments = mixture(300, hidden=64, inner=32, dtype=torch.bfloat16, device="cuda")
    trained = [arguments[i] for i in (0, 2, 3, 4)]
    experts = torch.compile(experts_of, fullgraph=True) if compiled else experts_of
    found, expected = experts(*arguments), expert_by_expert(*arguments)
    assert_close(found, expected, 2e-2)
    grads = torch.autograd.grad(found.float().square().sum(), trained)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), trained), strict=True):
        assert_close(got, want, 3e-2)


def test_experts_choose_by_the_dtype_that_autocast_gives(monkeypatch):
    """fp32 hidden states under a bf16 autocast are bf16 to the products."""
    asked = []

    def supports(spec):
        asked.append(spec)
        return Support(True, "the test's own")

    *_, reference_provider = GroupedMmSpec.providers
    monkeypatch.setattr(GroupedMmSpec, "providers", (replace(reference_provider, supports=supports),))
    with torch.autocast("cpu", torch.bfloat16):
        experts_of(*mixture(5))
    assert {spec.dtype for spec in asked} == {torch.bfloat16}
    assert {spec.weight_shape for spec in asked} == {torch.Size([8, 48, 32]), torch.Size([8, 32, 24])}
