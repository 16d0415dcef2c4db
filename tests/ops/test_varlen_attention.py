import time

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltatune import Sequences
from deltatune.ops import VarlenAttentionSpec, choose, varlen_attention

TINY = [1 + i % 6 for i in range(60)]
LENGTHS = {"mixed": [5, 1, 70, 7], "long": [127, 257, 64], "edges": [3, 2, 1, 63, 64, 65], "tiny": TINY}
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(
    tokens: int, heads: int = 4, key_heads: int = 2, dim: int = 16, batch: int = 1, dtype=torch.float32, device="cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    shapes = [(batch, tokens, n, dim) for n in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale=None, window=None) -> Tensor:
    """Dense attention of the flattened stream in fp64 with an explicit document mask."""
    repeats = q.shape[2] // k.shape[2]
    qs, ks, vs = (x.double().flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    ks, vs = ks.repeat_interleave(repeats, 0), vs.repeat_interleave(repeats, 0)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(q.device)
    i, j = torch.meshgrid(torch.arange(len(document)), torch.arange(len(document)), indexing="ij")
    i, j = i.to(q.device), j.to(q.device)
    visible = (document[i] == document[j]) & (j <= i)
    if window is not None:
        visible &= j > i - window
    scores = (qs @ ks.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ vs).transpose(0, 1).reshape(q.shape)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def check_against_oracle(q, k, v, sequences, lengths, tolerance, impl="auto", **options) -> None:
    found = varlen_attention(q, k, v, sequences=sequences, impl=impl, **options)
    expected = oracle(q, k, v, lengths, **options)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(q.device)
    assert found.dtype == q.dtype
    assert relative_error(found, expected) < tolerance
    grads = torch.autograd.grad(found, (q, k, v), grad.to(q.dtype))
    for got, want in zip(grads, torch.autograd.grad(expected, (q, k, v), grad.double()), strict=True):
        assert got.dtype == q.dtype
        assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("window", [None, 2, 33])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_equals_dense_attention(lengths, window, dtype, tolerance):
    q, k, v = inputs(sum(lengths), dtype=dtype)
    check_against_oracle(q, k, v, Sequences.from_lengths(lengths), lengths, tolerance, window=window)


def test_a_window_of_one_is_the_query_s_own_key():
    q, k, v = inputs(150)
    o = varlen_attention(q, k, v, window=1)
    torch.testing.assert_close(o, v.repeat_interleave(2, dim=2), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [2, 6, 64, 80, 256])
def test_head_dims(dim):
    lengths = [5, 1, 130, 7]
    q, k, v = inputs(sum(lengths), dim=dim)
    check_against_oracle(q, k, v, Sequences.from_lengths(lengths), lengths, 2e-6)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (4, 4), (5, 1)])
def test_query_heads_read_their_key_head(heads, key_heads):
    lengths = [9, 140]
    q, k, v = inputs(sum(lengths), heads, key_heads)
    check_against_oracle(q, k, v, Sequences.from_lengths(lengths), lengths, 2e-6, scale=0.3)


@pytest.mark.parametrize("tokens", [2, 63, 65, 300])
def test_without_sequences_each_row_is_one_document(tokens):
    q, k, v = inputs(tokens, batch=2, heads=2, key_heads=1, dim=8)
    check_against_oracle(q, k, v, None, [tokens, tokens], 2e-6)


def test_one_token_attends_to_itself():
    q, k, v = inputs(1)
    o = varlen_attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    torch.testing.assert_close(o, v.repeat_interleave(2, dim=2), rtol=0, atol=0)
    torch.testing.assert_close(dv, torch.full_like(v, 2.0), rtol=0, atol=0)
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q), torch.zeros_like(k)), rtol=0, atol=1e-6)


def test_two_rows_of_several_documents_with_padding():
    ids = torch.tensor([[1] * 5 + [2] * 1 + [3] * 30 + [0] * 4, [1] * 20 + [2] * 20])
    q, k, v = inputs(40, batch=2)
    check_against_oracle(q, k, v, Sequences.from_document_ids(ids), [5, 1, 30, 4, 20, 20], 2e-6)


def test_empty_documents_and_padding_tail():
    q, k, v = inputs(40)
    sequences = Sequences.from_lengths([0, 7, 0, 0, 20, 0], total=40, capacity=60)
    check_against_oracle(q, k, v, sequences, [7, 20, 13], 2e-6)


def test_no_tokens():
    q, k, v = inputs(0)
    o = varlen_attention(q, k, v, sequences=Sequences.from_lengths([]))
    o.sum().backward()
    assert o.shape == q.shape
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_other_documents_change_nothing_and_get_no_gradient(lengths):
    sequences = Sequences.from_lengths(lengths)
    q, k, v = inputs(sum(lengths))
    changed = len(lengths) // 2
    start = sum(lengths[:changed])
    inside = slice(start, start + lengths[changed])
    outside = torch.ones(sum(lengths), dtype=torch.bool)
    outside[inside] = False

    def outputs_and_gradients(*tensors: Tensor) -> list[Tensor]:
        o = varlen_attention(*tensors, sequences=sequences)
        return [o, *torch.autograd.grad(o.square().sum(), tensors)]

    before = outputs_and_gradients(q, k, v)
    for value in (3.0, float("nan")):
        perturbed = [x.detach().clone() for x in (q, k, v)]
        for x in perturbed:
            x[:, inside] = value
        after = outputs_and_gradients(*(x.requires_grad_() for x in perturbed))
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[:, outside], new[:, outside])
    loss = varlen_attention(q, k, v, sequences=sequences)[:, inside].square().sum()
    for grad in torch.autograd.grad(loss, (q, k, v)):
        assert not grad[:, outside].any()
        assert grad[:, inside].isfinite().all()


def test_non_contiguous_inputs():
    lengths = [9, 70, 1]
    packed = torch.randn(1, 80, 8, 16, requires_grad=True)
    q, k, v = packed.split([4, 2, 2], dim=2)
    check_against_oracle(q, k, v, Sequences.from_lengths(lengths), lengths, 2e-6)
    by_head = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    check_against_oracle(*by_head, Sequences.from_lengths(lengths), lengths, 2e-6)


def test_backward_twice_through_one_graph():
    q, k, v = inputs(20)
    loss = varlen_attention(q, k, v).sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_only_where_it_is_asked_for():
    q, k, v = inputs(20)
    varlen_attention(q.detach(), k, v.detach()).sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad is not None


def test_second_derivative_is_refused():
    q, k, v = inputs(8)
    (grad,) = torch.autograd.grad(varlen_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_opcheck():
    """With a window; test_varlen_attention_extras.py has it without."""
    sequences = Sequences.from_lengths([5, 1, 4])
    q, k, v = (x.detach()[0].requires_grad_() for x in inputs(10))
    args = (q, k, v, None, sequences.cu_seqlens, sequences.cu_seqlens_cpu, None, 0.25, 3, "reference")
    torch.library.opcheck(torch.ops.deltatune.varlen_attention.default, args)
    o, lse = torch.ops.deltatune.varlen_attention(*(x.detach() if isinstance(x, Tensor) else x for x in args))
    saved = [x.detach() for x in (q, k, v, o, lse)]
    arguments = (torch.randn_like(o), None, *saved, *args[3:])
    torch.library.opcheck(torch.ops.deltatune.varlen_attention_backward.default, arguments)


def test_one_graph_for_every_batch():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, sequences):
        return varlen_attention(2 * q, k, v, sequences=sequences) + 1

    batches = [[64], [5, 1, 50, 8], [1] * 64, [0, 60, 0]]
    for i, lengths in enumerate(batches):
        q, k, v = inputs(64)
        sequences = Sequences.from_lengths(lengths, total=64)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = layer(q, k, v, sequences)
            found.square().sum().backward()
        torch.testing.assert_close(found, varlen_attention(2 * q, k, v, sequences=sequences) + 1, rtol=0, atol=0)
    assert counter.frame_count == 1


def test_autocast_casts_the_inputs_and_nothing_inside():
    q, k, v = inputs(12)
    with torch.autocast("cpu", torch.bfloat16):
        o = varlen_attention(q, k.bfloat16(), v)
        (grad,) = torch.autograd.grad(o.float().square().sum(), q)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = varlen_attention(*rounded)
    (expected_grad,) = torch.autograd.grad(expected.float().square().sum(), rounded[0])
    assert torch.equal(o, expected)
    assert torch.equal(grad, expected_grad.float())


@pytest.mark.parametrize("window", [None, 64])
def test_no_intermediate_is_larger_than_a_block_of_queries_by_all_keys(window):
    from torch.utils._python_dispatch import TorchDispatchMode

    from deltatune.ops._varlen_attention import reference
    from deltatune.ops._varlen_attention.pairs import Pairs

    tokens, heads, dim = 1024, 2, 4
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return out

    q, k, v = (x.detach()[0] for x in inputs(tokens, heads, 1, dim))
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    pairs = Pairs(cu_seqlens, cu_seqlens, None, 0.5, window)
    with Largest():
        o, lse = reference.forward(q, k, v, None, pairs)
        reference.backward(torch.ones_like(o), None, q, k, v, o, lse, pairs)
    assert largest <= heads * 128 * tokens


def test_hundreds_of_tiny_documents_are_quick():
    lengths = [1 + i % 6 for i in range(200)]
    sequences = Sequences.from_lengths(lengths)
    q, k, v = inputs(sum(lengths), dim=64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        varlen_attention(q, k, v, sequences=sequences)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


def test_flops_count_the_pairs_that_meet():
    lengths, heads, dim = [3, 5], 4, 16
    q, k, v = inputs(8, heads, 2, dim)
    pairs = 6 + 15
    for window, expected in ((None, pairs), (2, 5 + 9)):
        with FlopCounterMode(display=False) as counter:
            varlen_attention(q, k, v, sequences=Sequences.from_lengths(lengths), window=window).sum().backward()
        assert counter.get_total_flops() == 14 * heads * dim * expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 9, 2, 16)}, "expected q"),
        ({"v": (1, 10, 2, 8)}, "expected q"),
        ({"q": (1, 10, 3, 16)}, "multiple"),
        ({"q": (10, 4, 16)}, "4 dims"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    shapes = {"q": (1, 10, 4, 16), "k": (1, 10, 2, 16), "v": (1, 10, 2, 16)} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(*(torch.zeros(s) for s in shapes.values()))


def test_bad_arguments():
    q, k, v = (x.detach() for x in inputs(10))
    with pytest.raises(ValueError, match="even"):
        varlen_attention(q[..., :3], k[..., :3], v[..., :3])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        varlen_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="share a dtype"):
        varlen_attention(q, k.half(), v)
    with pytest.raises(ValueError, match="floating point"):
        varlen_attention(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match="describe 9 tokens"):
        varlen_attention(q, k, v, sequences=Sequences.from_lengths([9]))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        varlen_attention(q, k, v, impl="torch")
    with pytest.raises(ValueError, match="'auto' or one of 'torch', 'reference'"):
        varlen_attention(q, k, v, impl="flash")


def test_boundaries_that_end_early_are_refused_in_the_op():
    q, k, v = (x.detach()[0] for x in inputs(10))
    short = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected B\*T = 10, got 9"):
        torch.ops.deltatune.varlen_attention(q, k, v, None, short, short, None, 1.0, None, "reference")


def test_choice_says_why():
    choice = choose(VarlenAttentionSpec(torch.device("cpu"), torch.float32))
    assert choice.impl == "reference"
    assert "NVIDIA GPU" in choice.reason


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("window", [None, 2, 33])
@pytest.mark.parametrize(
    ("dim", "impl"), [pytest.param(*c, marks=CUDA) for c in ((64, "torch"), (256, "torch"), (80, "reference"))]
)
def test_cuda_equals_dense_attention(lengths, window, dim, impl):
    q, k, v = inputs(sum(lengths), dim=dim, dtype=torch.bfloat16, device="cuda")
    sequences = Sequences.from_lengths(lengths, device="cuda")
    check_against_oracle(q, k, v, sequences, lengths, 1e-2, impl, window=window)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=CUDA) for d in (torch.bfloat16, torch.float32)])
def test_cuda_gradient_of_other_documents_is_exactly_zero(dtype):
    lengths = [5, 1, 70, 7]
    q, k, v = inputs(sum(lengths), dim=64, dtype=dtype, device="cuda")
    sequences = Sequences.from_lengths(lengths, total=100, device="cuda")
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 17)) for x in (q, k, v))
    loss = varlen_attention(q, k, v, sequences=sequences)[:, 6:76].float().square().sum()
    for grad in torch.autograd.grad(loss, (q, k, v)):
        assert not grad[:, :6].any()
        assert not grad[:, 76:].any()
        assert grad[:, 6:76].any()


@pytest.mark.parametrize("_", [pytest.param(None, marks=CUDA)])
def test_cuda_needs_no_sync_and_one_graph(_):
    layer = torch.compile(
        lambda q, k, v, s: varlen_attention(2 * q, k, v, sequences=s, window=40), fullgraph=True, dynamic=False
    )
    for i, lengths in enumerate(([64], [5, 1, 50, 8], [1] * 64)):
        q, k, v = inputs(64, dim=64, dtype=torch.bfloat16, device="cuda")
        sequences = Sequences.from_lengths(lengths, device="cuda")
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            if i:
                torch.cuda.set_sync_debug_mode("error")
            try:
                found = layer(q, k, v, sequences)
                found.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert relative_error(found, oracle(2 * q, k, v, lengths, window=40)) < 1e-2


@pytest.mark.parametrize("_", [pytest.param(None, marks=CUDA)])
def test_cuda_choice(_):
    assert choose(VarlenAttentionSpec(torch.device("cuda"), torch.bfloat16, head_dim=256)).impl == "torch"
    assert "float32" in choose(VarlenAttentionSpec(torch.device("cuda"), torch.float32)).reason
    assert "multiple of 8" in choose(VarlenAttentionSpec(torch.device("cuda"), torch.bfloat16, head_dim=12)).reason
