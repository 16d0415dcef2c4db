"""The implementation in blocks: sizes on any machine, its kernels in Triton's interpreter, the whole on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops import LinearCrossEntropySpec, choose, linear_cross_entropy
from deltatune.ops._linear_cross_entropy.blocks import Blocks, softmax_blocks, weight_blocks, workspace_bytes

CUDA = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a CUDA device of compute capability 9.0 or newer",
)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set by test_interpreted.py"
)


@pytest.mark.parametrize("width", [64, 1024, 2048, 5120])
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 248320])
@pytest.mark.parametrize("tokens", [0, 1, 63, 2049, 16384])
def test_blocks_are_whole_tiles_within_their_limits(tokens, vocabulary, width):
    for chunk, entries in (softmax_blocks(tokens, width, vocabulary), weight_blocks(tokens, vocabulary)):
        assert chunk % 128 == 0
        assert entries % 256 == 0
        assert chunk < tokens + 128 or chunk == 128
        assert entries < vocabulary + 256
    assert softmax_blocks(tokens, width, vocabulary).tokens <= 2048


def test_the_workspace_of_a_large_vocabulary():
    assert softmax_blocks(16384, 2048, 248320) == (2048, 8192)
    # no smaller below that width: a host launches no more blocks in the time they take
    assert softmax_blocks(16384, 1024, 248320) == (2048, 8192)
    # 32 MiB of exponentials, 16 of sums
    assert workspace_bytes(16384, 2048, 248320, 2, weight_grad=False) == 48 * 2**20
    # 16 MiB of gradients, 16 of sums, 64 of hidden
    assert workspace_bytes(16384, 2048, 248320, 2, weight_grad=True) == 96 * 2**20


@pytest.fixture
def two_tiles_at_once(monkeypatch):
    """A program of few tiles takes more than one turn, and sums of few tiles are read in more than one step."""
    from deltatune.ops._linear_cross_entropy import blocked

    monkeypatch.setattr(blocked, "_SPLITS", 2)
    monkeypatch.setattr(blocked, "_TILES_AT_ONCE", 2)


def interpreted_inputs(
    tokens: int, width: int, vocabulary: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width) * scale
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[1:3] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def in_float64(
    hidden: Tensor, weight: Tensor, labels: Tensor, counts: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, and the gradients of their sum, in which each counts what is given."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return losses.detach(), *torch.autograd.grad((losses * counts).sum(), (hidden, weight))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@interpreted
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "blocks"),
    [(5, 8, 1, Blocks(3, 16)), (5, 8, 7, Blocks(5, 16)), (20, 24, 100, Blocks(17, 40))],
    ids=["one entry", "one block", "several chunks and blocks, neither of whole tiles"],
)
def test_interpreted_kernels(two_tiles_at_once, tokens, width, vocabulary, blocks, scale):
    """At scale 40 most references rise, in the first block and later."""
    from deltatune.ops._linear_cross_entropy.blocked import losses_and_gradients

    hidden, weight, labels = interpreted_inputs(tokens, width, vocabulary, scale, torch.float32)
    counts = torch.linspace(-1, 2, tokens)
    wanted, counted = in_float64(hidden, weight, labels), in_float64(hidden, weight, labels, counts)
    hidden[1] = float("nan")
    found = losses_and_gradients(hidden, weight, labels, -100, True, True, None, blocks, blocks)
    assert all(error(*pair) < 2e-6 for pair in zip(found, wanted, strict=True))
    frozen = losses_and_gradients(hidden, weight, labels, -100, False, False, None, blocks, blocks)
    assert torch.equal(frozen[0], found[0])
    assert [x.shape[0] for x in frozen[1:]] == [0, 0]
    _, _, dweight = losses_and_gradients(hidden, weight, labels, -100, False, True, counts, blocks, blocks)
    assert error(dweight, counted[2]) < 2e-6


@interpreted
def test_interpreted_kernels_without_tokens():
    from deltatune.ops._linear_cross_entropy.blocked import losses_and_gradients

    losses, _, dweight = losses_and_gradients(*interpreted_inputs(0, 8, 7, 1.0, torch.float32), -100, True, True)
    assert losses.shape == (0,)
    assert not dweight.any()


@interpreted
def test_interpreted_kernels_store_16_bits():
    """Products of fp16 exponentials need a GPU; what is stored does not."""
    from deltatune.ops._linear_cross_entropy import blocked

    hidden, weight, labels = interpreted_inputs(20, 16, 100, 4.0, torch.float16)
    found, *_ = blocked.losses_and_gradients(hidden, weight, labels, -100, False, False, None, Blocks(16, 48))
    assert error(found, in_float64(hidden, weight, labels)[0]) < 1e-6
    logits = hidden.double() @ weight.double().T
    reference = logits.max(1).values.float()
    powers = torch.exp(logits - reference[:, None].double())
    picked = powers.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    total = powers.sum(1)
    stored = torch.full((20, 48), float("nan"), dtype=torch.float16)
    rows = blocked.Rows(hidden, weight, labels, -100)
    statistics = reference, (total - picked).float(), total.reciprocal().float()
    blocked.gradients(blocked.chunk_of(rows, stored), *statistics, slice(32, 80))
    want = powers / total[:, None] - F.one_hot(labels.clamp_min(0), 100)
    want[labels == -100] = 0
    assert error(stored, want[:, 32:80]) < 5e-4


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.bfloat16, 64, "needs an NVIDIA GPU, the inputs are on cpu"),
        (torch.float32, 64, "take bf16 and fp16, the inputs are torch.float32"),
        (torch.bfloat16, 12, "multiple of 8, got 12"),
    ],
)
def test_it_is_refused_where_it_cannot_run(dtype, width, message):
    with pytest.raises(ValueError, match=message):
        choose(LinearCrossEntropySpec(torch.device("cpu"), dtype, width=width), "triton")


def gpu_inputs(tokens: int, vocabulary: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, 256, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 256, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    labels[: tokens // 5] = -100
    return hidden, weight, labels


def errors(impl: str, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> list[float]:
    """Relative to float64: loss, gradient of hidden, gradient of weight, under losses that count differently."""
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction=reduction)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=impl)
    counts = torch.linspace(1, 3, loss.numel(), device="cuda").view(loss.shape)
    found = (loss, *torch.autograd.grad((loss * counts).sum(), (hidden, weight)))
    expected = (wanted, *torch.autograd.grad((wanted * counts).sum(), wide))
    return [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, expected, strict=True)]


@CUDA
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 8.0])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (63, 1000), (2500, 20011)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_errors_are_at_most_twice_the_references(tokens, vocabulary, scale, dtype, reduction):
    """At scale 8 logits exceed the label's by more than either dtype's headroom."""
    batch = gpu_inputs(tokens, vocabulary, dtype, scale)
    assert choose(LinearCrossEntropySpec(torch.device("cuda"), dtype, width=256)).impl == "triton"
    for found, allowed in zip(errors("triton", *batch, reduction), errors("reference", *batch, reduction), strict=True):
        # one token's loss is a few fp32 operations, each a unit in the last place; less than two in all is an accident
        assert found <= 2 * max(allowed, 2 * torch.finfo(torch.float32).eps)


@CUDA
@pytest.mark.cuda
def test_ignored_tokens_may_hold_anything_on_a_gpu():
    hidden, weight, labels = gpu_inputs(300, 1000, torch.bfloat16, 0.1)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, impl="triton"), (hidden, weight))
    poisoned = hidden.detach().masked_fill((labels == -100).unsqueeze(-1), float("nan")).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels, impl="triton")
    for got, want in zip(torch.autograd.grad(loss, (poisoned, weight)), wanted, strict=True):
        assert torch.equal(got, want)


@CUDA
@pytest.mark.cuda
@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck_on_a_gpu(weight_grad):
    hidden, weight, labels = gpu_inputs(40, 300, torch.bfloat16, 0.1)
    args = (hidden, weight.requires_grad_(weight_grad), labels, -100, True, weight_grad, "triton")
    torch.library.opcheck(torch.ops.deltatune.linear_cross_entropy.default, args)
    torch.library.opcheck(torch.ops.deltatune.token_losses.default, args)


@CUDA
@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_waits_for_the_gpu(reduction):
    batch = gpu_inputs(300, 1000, torch.bfloat16, 0.1)
    linear_cross_entropy(*batch, reduction=reduction, impl="triton").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*batch, reduction=reduction, impl="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("impl", "products", "by_token"), [("reference", 3, 4), ("triton", 4, 5)])
def test_products_are_counted(impl, products, by_token):
    """Nothing runs but the formula; the weight's gradient takes the logits once more in blocks, and once by token."""
    found = []
    for reduction in ("linear_cross_entropy", "token_losses"):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            hidden, weight = (torch.empty(size, 16, requires_grad=True) for size in (64, 200))
            labels = torch.empty(64, dtype=torch.long)
            op = getattr(torch.ops.deltatune, reduction)
            op(hidden, weight, labels, -100, True, True, impl)[0].sum().backward()
        found.append(counter.get_total_flops() / (2 * 64 * 16 * 200))
    assert found == [products, by_token]
