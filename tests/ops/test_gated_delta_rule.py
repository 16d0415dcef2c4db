"""The gated delta rule against the recurrence it stands for, token by token in float64."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim

import math
import time

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops import GatedDeltaRuleSpec, choose, gated_delta_rule
from deltatune.packing.sequences import Sequences

NAMES = ("q", "k", "v", "g", "beta")
LENGTHS = ([5, 1, 70, 7], [127, 257, 64], [3, 2, 1, 63, 64, 65], [1 + n % 3 for n in range(70)])
SLOW, FAST = 0.05, 20.0


def make_inputs(tokens, *, batch=1, heads=(2, 4), dims=(8, 12), decay=SLOW, dtype=torch.float32, seed=0):
    (H, G), (K, V) = heads, dims
    generator = torch.Generator().manual_seed(seed)
    shapes = [(H, K), (H, K), (G, V), (G,), (G,)]
    q, k, v, g, beta = (
        torch.randn(batch, tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    g, beta = -decay * g.sigmoid(), beta.sigmoid()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]


def recurrence(q, k, v, g, beta, lengths, *, scale=None, qk_l2norm=True, dtype=torch.float64):
    """The definition, one token after the other: S = exp(g) S; S += k (beta (v - S^T k))^T; o = S^T (scale q)."""
    group = v.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_, k_, v_, g_, beta_ = (x.to(dtype).flatten(0, 1) for x in (q, k, v, g, beta))
    if qk_l2norm:
        q_, k_ = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q_, k_))
    q_, k_ = (x.repeat_interleave(group, dim=1) for x in (q_ * scale, k_))
    outputs, token = [], 0
    for length in lengths:
        state = torch.zeros(v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
        for t in range(token, token + length):
            state = g_[t].exp()[:, None, None] * state
            update = beta_[t][:, None] * (v_[t] - torch.einsum("gkv,gk->gv", state, k_[t]))
            state = state + torch.einsum("gk,gv->gkv", k_[t], update)
            outputs.append(torch.einsum("gkv,gk->gv", state, q_[t]))
        token += length
    return torch.stack(outputs).reshape(v.shape)


def run(function, inputs, *args, **kwargs):
    """The output and the five gradients of a weighted sum of it."""
    o = function(*inputs, *args, **kwargs)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o.detach(), *torch.autograd.grad((o * weights.to(o.dtype)).sum(), inputs)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def relative_errors(got, expected):
    return {name: relative_error(a, b) for name, a, b in zip(("o", *NAMES), got, expected, strict=True)}


@pytest.mark.parametrize("decay", [SLOW, FAST])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "long", "edges", "tiny"])
def test_output_and_gradients_are_those_of_the_recurrence(lengths, decay):
    inputs = make_inputs(sum(lengths), decay=decay)
    got = run(gated_delta_rule, inputs, sequences=Sequences.from_lengths(lengths))
    errors = relative_errors(got, run(recurrence, inputs, lengths))
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (2, 4), (1, 3)])
def test_value_head_reads_its_key_head(heads):
    inputs = make_inputs(70, heads=heads, dtype=torch.float64)
    errors = relative_errors(run(gated_delta_rule, inputs), run(recurrence, inputs, [70]))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"qk_l2norm": False}, {"scale": 1, "qk_l2norm": False}])
def test_scale_and_normalisation(options):
    inputs = make_inputs(70, dtype=torch.float64)
    with torch.no_grad():
        inputs[1] /= 4  # unnormalised keys of length above 1 make the recurrence itself diverge
    errors = relative_errors(run(gated_delta_rule, inputs, **options), run(recurrence, inputs, [70], **options))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize(("batch", "tokens"), [(2, 1), (2, 63), (3, 65), (1, 400)])
def test_without_sequences_each_row_is_one_document(batch, tokens):
    inputs = make_inputs(tokens, batch=batch, heads=(1, 2))
    errors = relative_errors(run(gated_delta_rule, inputs), run(recurrence, inputs, [tokens] * batch))
    assert max(errors.values()) < 1e-6, errors


def test_rows_with_documents_of_their_own_and_padding():
    ids = torch.tensor([[1] * 20 + [2] * 7 + [0] * 3, [1] * 1 + [2] * 25 + [0] * 4])
    inputs = make_inputs(30, batch=2, dtype=torch.float64)
    got = run(gated_delta_rule, inputs, sequences=Sequences.from_document_ids(ids))
    errors = relative_errors(got, run(recurrence, inputs, [20, 7, 3, 1, 25, 4]))
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "long", "edges", "tiny"])
def test_packed_equals_alone(lengths):
    inputs = make_inputs(sum(lengths))
    o = gated_delta_rule(*inputs, sequences=Sequences.from_lengths(lengths))
    for packed, *document in zip(*(x.split(lengths, 1) for x in (o, *inputs)), strict=True):
        assert relative_error(packed, gated_delta_rule(*document)) < 1e-6


def boundaries(lengths):
    return [sum(lengths[:n]) for n in range(len(lengths))]


@pytest.mark.parametrize("lengths", [*LENGTHS[:3], [2] * 100 + [130]], ids=["mixed", "long", "edges", "tiny and long"])
@pytest.mark.parametrize("document", [0, 1, -1])
def test_gradient_reaches_no_other_document(lengths, document):
    inputs = make_inputs(sum(lengths) + 9)
    o = gated_delta_rule(*inputs, sequences=Sequences.from_lengths(lengths, total=sum(lengths) + 9))
    begin = boundaries(lengths)[document]
    own = slice(begin, begin + lengths[document])
    grads = torch.autograd.grad(o[:, own].square().sum(), inputs)
    for name, grad in zip(NAMES, grads, strict=True):
        assert lengths[document] == 1 or grad[:, own].abs().max() > 0, name
        assert grad[:, : own.start].count_nonzero() == 0, name
        assert grad[:, own.stop :].count_nonzero() == 0, name


@pytest.mark.parametrize("value", ["random", math.nan, math.inf])
@pytest.mark.parametrize("lengths", [[5, 1, 70, 7], [3, 2, 1, 63, 64, 65], [2] * 50 + [130]])
def test_changing_a_document_leaves_the_others_bit_identical(lengths, value):
    sequences = Sequences.from_lengths(lengths)
    changed = len(lengths) // 2
    begin = boundaries(lengths)[changed]
    own = slice(begin, begin + lengths[changed])
    inputs = make_inputs(sum(lengths))
    others = make_inputs(sum(lengths), seed=7)
    perturbed = [x.detach().clone() for x in inputs]
    for x, other in zip(perturbed, others, strict=True):
        x[:, own] = other[:, own] if value == "random" else value
    before = run(gated_delta_rule, inputs, sequences=sequences)
    after = run(gated_delta_rule, [x.requires_grad_() for x in perturbed], sequences=sequences)
    for name, x, y in zip(("o", *NAMES), before, after, strict=True):
        assert not torch.equal(x[:, own], y[:, own]), name
        assert torch.equal(x[:, : own.start], y[:, : own.start]), name
        assert torch.equal(x[:, own.stop :], y[:, own.stop :]), name


@pytest.mark.parametrize("decay", [-20.0, -1e4, -math.inf])
def test_strong_decay_stays_finite_and_exact(decay):
    inputs = make_inputs(130)
    with torch.no_grad():
        inputs[3][:, ::3] = decay
    got, expected = run(gated_delta_rule, inputs), run(recurrence, inputs, [130])
    assert all(x.isfinite().all() for x in got)
    assert relative_error(got[0], expected[0]) < 1e-6
    for name, x, y in zip(NAMES, got[1:], expected[1:], strict=True):
        # the gradient of a g of -inf is 0 in both
        assert relative_error(x, y) < 1e-6, name


def test_bf16_error_is_within_twice_that_of_the_fp32_recurrence():
    lengths = [70, 5, 130]
    inputs = make_inputs(sum(lengths), dims=(16, 16), dtype=torch.bfloat16)
    exact = run(recurrence, [x.detach().double().requires_grad_() for x in inputs], lengths)
    got = relative_errors(run(gated_delta_rule, inputs, sequences=Sequences.from_lengths(lengths)), exact)
    in_fp32 = run(recurrence, [x.detach().float().requires_grad_() for x in inputs], lengths, dtype=torch.float32)
    budget = relative_errors([x.bfloat16() for x in in_fp32], exact)
    assert all(got[name] <= 2 * budget[name] for name in got), (got, budget)


def test_autocast_rounds_nothing_inside():
    inputs = make_inputs(70)
    expected = run(gated_delta_rule, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(gated_delta_rule, inputs)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_each_gradient_has_the_dtype_of_its_input():
    inputs = [x.detach() for x in make_inputs(20, dtype=torch.bfloat16)]
    inputs[3] = inputs[3].float()
    inputs = [x.requires_grad_() for x in inputs]
    o, *grads = run(gated_delta_rule, inputs)
    assert o.dtype == torch.bfloat16
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]


@pytest.mark.parametrize("wanted", range(5))
def test_each_input_alone_may_need_its_gradient(wanted):
    inputs = make_inputs(40)
    expected = run(gated_delta_rule, inputs)[1 + wanted]
    only = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(inputs)]
    weights = torch.randn(only[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    (gated_delta_rule(*only) * weights).sum().backward()
    assert torch.equal(only[wanted].grad, expected)
    assert all(x.grad is None for index, x in enumerate(only) if index != wanted)


def test_non_contiguous_inputs_and_gradient():
    inputs = make_inputs(40)
    strided = [torch.cat([x, x], dim=-1).detach()[..., : x.shape[-1]].requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    o = gated_delta_rule(*strided)
    assert torch.equal(o, gated_delta_rule(*inputs))
    # the gradient of a sum is expanded, with strides of 0
    expected = torch.autograd.grad(gated_delta_rule(*inputs), inputs, torch.ones_like(o))
    for x, y in zip(torch.autograd.grad(o.sum(), strided), expected, strict=True):
        assert torch.equal(x, y)


def test_empty_documents_and_no_tokens():
    inputs = make_inputs(12)
    repeated = Sequences.from_cu_seqlens(torch.tensor([0, 0, 5, 5, 12, 12]))
    assert torch.equal(
        gated_delta_rule(*inputs, sequences=repeated),
        gated_delta_rule(*inputs, sequences=Sequences.from_lengths([5, 7])),
    )
    none = make_inputs(0)
    o = gated_delta_rule(*none)
    o.sum().backward()
    assert o.shape == (1, 0, 4, 12)
    assert none[0].grad.shape == none[0].shape


def test_double_backward_is_refused():
    inputs = make_inputs(8)
    (grad,) = torch.autograd.grad(gated_delta_rule(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_backward_leaves_its_inputs_alone():
    inputs = make_inputs(70)
    before = [x.detach().clone() for x in inputs]
    o = gated_delta_rule(*inputs)
    kept = o.detach().clone()
    first = torch.autograd.grad(o.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(o.sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip([*inputs, o], [*before, kept], strict=True))


@pytest.mark.parametrize("described", [False, True])
def test_opcheck(described):
    inputs = make_inputs(13)
    sequences = Sequences.from_lengths([5, 1, 7])
    options = (None, 0.5, True, sequences.cu_seqlens_cpu if described else None, "reference")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    grad = torch.ones_like(detached[2])
    kept = [torch.empty(0) for _ in range(4)]
    arguments = (*detached, *options, grad, None, *kept)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_compiles_whole_and_only_once_for_any_documents():
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, fullgraph=True)
    inputs = make_inputs(83)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 1, 70, 7], [83], [1] * 83, [40, 43]):
            sequences = Sequences.from_lengths(lengths)
            got = run(compiled, inputs, sequences=sequences)
            for x, y in zip(got, run(gated_delta_rule, inputs, sequences=sequences), strict=True):
                assert torch.equal(x, y)


def test_checkpointed_inside_a_compiled_function():
    torch._dynamo.reset()

    def layer(q, k, v, g, beta, sequences):
        return gated_delta_rule(q * 2, k, v.tanh(), g, beta, sequences=sequences) ** 2

    def checkpointed(*args, **kwargs):
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)

    inputs, sequences = make_inputs(83), Sequences.from_lengths([5, 1, 70, 7])
    got = run(torch.compile(checkpointed, fullgraph=True, backend="aot_eager"), inputs, sequences=sequences)
    for x, y in zip(got, run(layer, inputs, sequences=sequences), strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_graph_does_not_grow_with_the_tokens(tokens):
    nodes = []

    def count(graph, _):
        nodes.append(len([node for node in graph.graph.nodes if node.op == "call_function"]))
        return graph

    torch._dynamo.reset()
    torch.compile(gated_delta_rule, fullgraph=True, backend=count)(*make_inputs(tokens, heads=(1, 1), dims=(4, 4)))
    assert nodes == [2]  # the op, and o out of what it returns


def test_trains_at_4096_tokens_within_seconds():
    inputs = make_inputs(4096, heads=(4, 4), dims=(64, 64))
    started = time.process_time()  # the work done, not the wait for a busy machine
    gated_delta_rule(*inputs).sum().backward()
    assert time.process_time() - started < 20


@pytest.mark.parametrize("lengths", [[1] * 64, [64]])
def test_counts_flops_of_forward_and_backward(lengths):
    inputs = make_inputs(64, heads=(1, 2), dims=(8, 16))
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        gated_delta_rule(*inputs, sequences=Sequences.from_lengths(lengths))
    with both:
        gated_delta_rule(*inputs, sequences=Sequences.from_lengths(lengths)).sum().backward()
    # QK^T and KK^T, half a solve for [V | K], P U, and three products with the state
    assert forward.get_total_flops() == 2 * 64 * 2 * (2 * 64 * 8 + 64 * 24 // 2 + 64 * 16 + 3 * 8 * 16)
    assert both.get_total_flops() > 3 * forward.get_total_flops()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(1, 8, 2, 4)},
            r"k has K=8 where 4 is expected; expected q \[B, T, H, K\].*got q \[1, 8, 2, 4\]",
        ),
        ({"k": torch.zeros(8, 2, 8)}, r"k must have 4 dims"),
        ({"v": torch.zeros(1, 8, 3, 12), "g": torch.zeros(1, 8, 3), "beta": torch.zeros(1, 8, 3)}, "G=3.*and H=2"),
        ({"g": torch.zeros(1, 8, 5)}, "g has G=5 where 4 is expected"),
        ({"beta": torch.zeros(1, 9, 4)}, "beta has T=9 where 8 is expected"),
        ({"beta": torch.zeros(1, 8, 4, dtype=torch.long)}, "beta must be floating point, got torch.int64"),
        ({"v": torch.zeros(1, 8, 4, 12, device="meta")}, "v is on meta but q is on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = dict(zip(NAMES, make_inputs(8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**inputs)


def test_sequences_of_another_stream_are_refused():
    with pytest.raises(ValueError, match=r"describe 9 tokens but the input holds B\*T = 1\*8 = 8"):
        gated_delta_rule(*make_inputs(8), sequences=Sequences.from_lengths([9]))


def test_an_unknown_implementation_is_refused_with_those_known():
    with pytest.raises(
        ValueError, match=r"unknown impl='fast'; expected 'auto' or one of 'flash_qla', 'fla', 'reference'"
    ):
        gated_delta_rule(*make_inputs(8), impl="fast")


def test_the_choice_says_what_runs():
    choice = choose(GatedDeltaRuleSpec(torch.device("cpu"), torch.bfloat16))
    assert (choice.impl, choice.reason) == ("reference", "chunked torch on cpu, accumulating in fp32")
    named = choose(GatedDeltaRuleSpec(torch.device("cpu"), torch.bfloat16), "reference")
    assert named.impl == "reference"
