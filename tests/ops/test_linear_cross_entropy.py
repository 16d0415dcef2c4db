import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops import LinearCrossEntropySpec, choose, linear_cross_entropy
from deltatune.ops._linear_cross_entropy import reference, torch_chunked

needs_torch_213 = pytest.mark.skipif(torch_chunked.missing() is not None, reason="needs torch >= 2.13")
IMPLS = [pytest.param("torch", marks=needs_torch_213), "reference"]
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(tokens=33, width=16, vocabulary=200, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(2, tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, tokens), generator=generator).to(device)
    labels[:, : tokens // 3] = -100
    return hidden, weight, labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), **options)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tokens", [1, 2, 65])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_cross_entropy(impl, reduction, tokens, dtype, tolerance):
    hidden, weight, labels = inputs(tokens, dtype=dtype)
    found = linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=impl)
    expected = oracle(hidden, weight, labels, reduction=reduction)
    assert found.dtype == dtype
    assert found.shape == ()
    assert relative_error(found, expected) < tolerance
    # an upstream gradient other than one
    grads = torch.autograd.grad(found * 3, (hidden, weight))
    for got, want in zip(grads, torch.autograd.grad(expected * 3, (hidden, weight)), strict=True):
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_each_token_has_a_loss_and_a_gradient_of_its_own(impl, weight_grad, dtype, tolerance):
    hidden, weight, labels = inputs(65, dtype=dtype)
    wanted = [hidden, weight.requires_grad_(weight_grad)][: 1 + weight_grad]
    found = linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl)
    expected = oracle(hidden, weight, labels, reduction="none").view(labels.shape)
    assert (found.dtype, found.shape) == (dtype, labels.shape)
    assert not found[labels == -100].any()
    assert relative_error(found, expected) < tolerance
    # losses that count differently, some of them nothing, and one that is squared
    counts = torch.linspace(-2, 3, labels.shape[1], dtype=dtype).round()
    grads = torch.autograd.grad((found * counts).sum() + found[0, -1] ** 2, wanted, retain_graph=True)
    exact = torch.autograd.grad((expected * counts).sum() + expected[0, -1] ** 2, wanted, retain_graph=True)
    again = torch.autograd.grad(found.sum(), wanted)
    for got, want in zip([*grads, *again], [*exact, *torch.autograd.grad(expected.sum(), wanted)], strict=True):
        assert relative_error(got, want) < tolerance


def test_token_losses_in_bf16_lose_no_more_than_their_inputs_did():
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden, weight, labels, reduction="none")
    expected = oracle(hidden, weight, labels, reduction="none").view(labels.shape)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-6
    counts = torch.linspace(-2, 3, labels.shape[1])
    grads = torch.autograd.grad((found * counts).sum(), (hidden, weight))
    for got, want in zip(grads, torch.autograd.grad((expected * counts).sum(), (hidden, weight)), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, want) < 3e-3


def test_bf16_loses_no_more_than_its_inputs_did():
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden, weight, labels)
    expected = oracle(hidden, weight, labels, reduction="sum")
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-6
    grads = torch.autograd.grad(found, (hidden, weight))
    for got, want in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, want) < 3e-3


@needs_torch_213
def test_torch_in_bf16_runs_when_named_and_gives_the_rounded_loss_in_fp32():
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden, weight, labels, impl="torch")
    assert found.dtype == torch.float32
    assert found == found.bfloat16()
    # the sum is kept in 8 bits: a chunk's share and the total each lose up to one part in 256
    assert relative_error(found, oracle(hidden, weight, labels, reduction="sum")) < 2 / 256


@pytest.mark.parametrize("impl", IMPLS)
def test_no_label_that_counts(impl):
    hidden, weight, labels = inputs()
    labels.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, labels, impl=impl)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()
    assert linear_cross_entropy(hidden, weight, labels, reduction="mean", impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_ignore_index_may_be_a_token(impl):
    hidden, weight, labels = inputs()
    labels[labels == -100] = 7
    found = linear_cross_entropy(hidden, weight, labels, ignore_index=7, impl=impl)
    assert relative_error(found, oracle(hidden, weight, labels, ignore_index=7, reduction="sum")) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_labels_and_strided_hidden(impl):
    hidden, weight, labels = inputs()
    strided = hidden.transpose(0, 1)
    found = linear_cross_entropy(strided, weight, labels.T.int(), impl=impl)
    assert relative_error(found, oracle(hidden, weight, labels, reduction="sum")) < 2e-6
    found.backward()
    assert hidden.grad.shape == hidden.shape


def test_no_tokens():
    hidden, weight, labels = inputs(0)
    loss = linear_cross_entropy(hidden, weight, labels, impl="reference")
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_ignored_tokens_may_hold_anything():
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, impl="reference"), (hidden, weight))
    poisoned = hidden.detach().masked_fill((labels == -100).unsqueeze(-1), float("nan")).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels, impl="reference")
    for got, want in zip(torch.autograd.grad(loss, (poisoned, weight)), expected, strict=True):
        assert torch.equal(got, want)


def test_a_sure_token_keeps_its_gradient_in_16_bits():
    """p - 1 near p = 1 has no correct digit once p is rounded to 16 bits."""
    logits = torch.tensor([[9.0, 0.0, 1.0], [0.0, 7.0, -3.0]])
    target = torch.tensor([[0], [1]])
    expected = logits.double().softmax(1) - F.one_hot(target.squeeze(1), 3)
    _, found = reference._softmax_loss(logits, target, torch.bfloat16)
    assert ((found - expected).abs() <= expected.abs() / 256).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_losses_before_two_backwards(impl):
    first, second = inputs(33), inputs(34)
    losses = [linear_cross_entropy(*batch, impl=impl) for batch in (first, second)]
    for loss, batch in zip(losses, (first, second), strict=True):
        grads = torch.autograd.grad(loss, batch[:2], retain_graph=True)
        again = torch.autograd.grad(loss, batch[:2])
        wanted = torch.autograd.grad(oracle(*batch, reduction="sum"), batch[:2])
        for got, repeated, want in zip(grads, again, wanted, strict=True):
            assert torch.equal(got, repeated)
            assert relative_error(got, want) < 2e-6


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.seen.append((func.overloadpacket.__name__, tuple(x.shape)))
        return out


@pytest.mark.parametrize("hidden_grad", [True, False])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_frozen_inputs_cost_no_product(hidden_grad, weight_grad):
    tokens, width, vocabulary = 64, 16, 200
    hidden, weight, labels = (x.detach() for x in inputs(tokens // 2, width, vocabulary))
    with Shapes() as shapes:
        reference.losses_and_gradients(hidden.flatten(0, 1), weight, labels.flatten(), -100, hidden_grad, weight_grad)
    products = [shape for name, shape in shapes.seen if "mm" in name]
    assert products.count((16, vocabulary)) == 4
    assert products.count((16, width)) == 4 * hidden_grad
    assert products.count((vocabulary, width)) == 4 * weight_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_head_gets_no_gradient(impl):
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight.requires_grad_(False), labels, impl=impl).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_grad_computes_the_loss_alone():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(*inputs(64, 16, 200), impl="reference")
    assert counter.get_total_flops() == 2 * 128 * 16 * 200
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*inputs(64, 16, 200), impl="reference").backward()
    assert counter.get_total_flops() == 3 * 2 * 128 * 16 * 200


@pytest.mark.parametrize("tokens", [4, 5, 64, 1000])
def test_a_chunk_is_at_most_a_quarter_of_the_tokens(tokens):
    assert 1 <= reference.chunk_tokens(tokens, 200, weight_grad=True) <= -(-tokens // 4)


def test_chunks_of_a_large_vocabulary_are_whole_tiles():
    assert reference.chunk_tokens(16384, 248320, weight_grad=False) == 256
    assert reference.chunk_tokens(16384, 248320, weight_grad=True) == 1024


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_logits_of_the_pack_are_never_held(impl, weight_grad, reduction):
    """The largest allocation, forward and backward, stays below half the logits."""
    tokens, width, vocabulary = 64, 8, 1000
    hidden, weight, labels = inputs(tokens // 2, width, vocabulary)
    weight.requires_grad_(weight_grad)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=impl).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    assert 0 < largest < tokens * vocabulary * 4 / 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_fullgraph(impl, weight_grad, reduction):
    hidden, weight, labels = inputs()
    weight.requires_grad_(weight_grad)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def head(hidden, weight, labels):
        losses = linear_cross_entropy(2 * hidden, weight, labels, reduction=reduction, impl=impl)
        return losses if reduction == "mean" else losses.sum() / (labels != -100).sum()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (labels, labels.roll(5)):
            found = head(hidden, weight, batch)
            expected = oracle(2 * hidden, weight, batch)
            assert relative_error(found, expected) < 2e-6
            grads = torch.autograd.grad(found, wanted)
            for got, want in zip(grads, torch.autograd.grad(expected, wanted), strict=True):
                assert relative_error(got, want) < 2e-6


@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck(weight_grad):
    hidden, weight, labels = inputs(10)
    weight.requires_grad_(weight_grad)
    args = (hidden.detach()[0].requires_grad_(), weight, labels[0], -100, True, weight_grad, "reference")
    torch.library.opcheck(torch.ops.deltatune.linear_cross_entropy.default, args)
    torch.library.opcheck(torch.ops.deltatune.token_losses.default, args)


def test_autocast_casts_the_inputs_and_nothing_inside():
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(found, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))
    found.backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, r"expected hidden \[..., E\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \[3\]"),
        ({"labels": torch.zeros(2, 3)}, "labels must be integers"),
        ({"hidden": torch.zeros(2, 3, 4).half()}, "share a dtype"),
        ({"reduction": "batchmean"}, "'sum', 'mean' or 'none', got 'batchmean'"),
        ({"impl": "liger"}, "'auto' or one of"),
        ({"labels": torch.full((2, 3), 9)}, r"in \[0, 9\), got some in \[9, 9\]"),
        ({"labels": torch.full((2, 3), -1)}, r"got some in \[-1, -1\]"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(9, 4),
        "labels": torch.zeros(2, 3, dtype=torch.long),
        "impl": "reference",
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))


def test_choice_says_why():
    assert "16-bit" in choose(LinearCrossEntropySpec(torch.device("cpu"), torch.bfloat16)).reason
    exact = choose(LinearCrossEntropySpec(torch.device("cpu"), torch.float32))
    assert exact.impl == ("reference" if torch_chunked.missing() else "torch")


def test_a_torch_without_the_function_runs_the_reference(monkeypatch):
    monkeypatch.setattr(torch_chunked, "_function", None)
    choice = choose(LinearCrossEntropySpec(torch.device("cpu"), torch.float32))
    assert choice.impl == "reference"
    assert "install torch >= 2.13" in choice.reason
    with pytest.raises(ValueError, match=r"install torch >= 2\.13"):
        linear_cross_entropy(*inputs(), impl="torch")


@pytest.mark.parametrize("retain", [True, False])
def test_backward_scales_in_place_unless_the_graph_is_kept(retain):
    hidden, weight, labels = (x.detach() for x in inputs(9))
    hidden = hidden[0].clone().requires_grad_()
    loss, dhidden, _ = torch.ops.deltatune.linear_cross_entropy(
        hidden, weight, labels[0], -100, True, False, "reference"
    )
    before = dhidden.clone()
    (found,) = torch.autograd.grad(loss * 3, hidden, retain_graph=retain)
    assert torch.equal(found, before * 3)
    assert (found.data_ptr() == dhidden.data_ptr()) is not retain


@pytest.mark.parametrize("weight_grad", [pytest.param(w, marks=CUDA) for w in (True, False)])
def test_cuda_bf16(weight_grad):
    hidden, weight, labels = inputs(500, 64, 4000, dtype=torch.bfloat16, device="cuda")
    weight.requires_grad_(weight_grad)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    found = linear_cross_entropy(hidden, weight, labels, impl="reference")
    expected = oracle(hidden, weight, labels, reduction="sum")
    assert relative_error(found, expected) < 1e-5
    for got, want in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert relative_error(got, want) < 5e-3
