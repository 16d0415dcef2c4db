"""The gated delta rule on FLA and FlashQLA against the reference in float64."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from deltatune.ops import GatedDeltaRuleSpec, choose, gated_delta_rule
from deltatune.ops._gated_delta_rule import library, reference
from deltatune.ops._gated_delta_rule.reference import Inputs
from deltatune.packing.sequences import Sequences

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("q", "k", "v", "g", "beta")
DIM = 128
LENGTHS = {
    "mixed": [5, 1, 70, 7],
    "long": [127, 257, 64],
    "edges": [3, 2, 1, 63, 64, 65],
    "many": [1 + 7 * n % 40 for n in range(512)],
}
SLOW, FAST = 0.05, 20.0


@pytest.fixture(params=["fla", "flash_qla"])
def impl(request):
    try:
        choose(GatedDeltaRuleSpec(torch.device("cuda"), torch.bfloat16, head_dims=(DIM, DIM)), request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def make_inputs(
    tokens, *, batch=1, heads=(16, 16), dims=(DIM, DIM), decay=SLOW, dtype=torch.bfloat16, gates=(torch.float32, None)
):
    (H, G), (K, V) = heads, dims
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(H, K), (H, K), (G, V), (G,), (G,)]
    q, k, v, g, beta = (torch.randn(batch, tokens, *x, generator=generator, device="cuda") for x in shapes)
    g, beta = -decay * g.sigmoid(), beta.sigmoid()
    dtypes = (dtype, dtype, dtype, gates[0], gates[1] or dtype)
    return [x.to(to).requires_grad_() for x, to in zip((q, k, v, g, beta), dtypes, strict=True)]


def run(function, inputs, *args, **kwargs):
    """The output and the five gradients of a weighted sum of it."""
    o = function(*inputs, *args, **kwargs)
    return [o.detach(), *torch.autograd.grad(o, inputs, weights_of(o))]


def weights_of(o):
    weights = torch.randn(o.shape, generator=torch.Generator(o.device).manual_seed(1), device=o.device)
    return weights.bfloat16().to(o.dtype)  # the same numbers whatever the dtype


def relative_errors(got, expected):
    pairs = zip(("o", *NAMES), got, expected, strict=True)
    return {name: ((a.double() - b.double()).norm() / b.double().norm()).item() for name, a, b in pairs}


class RoundedOperands(TorchFunctionMode):
    """Matrix products of operands rounded to 16 bits, accumulated in fp32, as matrix units compute them."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [x.to(self.dtype).to(x.dtype) for x in args]
        return func(*args, **(kwargs or {}))


def exact_and_budget(inputs, *, sequences=None, scale=None, qk_l2norm=True):
    """The results in float64, and the errors that the chunked reference makes with 16-bit operands."""
    options = {"scale": inputs[0].shape[-1] ** -0.5 if scale is None else scale, "qk_l2norm": qk_l2norm}
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(gated_delta_rule, exact_inputs, sequences=sequences, impl="reference", **options)
    batch, tokens = inputs[0].shape[:2]
    boundaries = torch.arange(batch + 1) * tokens if sequences is None else sequences.cu_seqlens_cpu
    detached = Inputs(*(x.detach() for x in inputs), None, **options)
    with RoundedOperands(inputs[0].dtype):  # an op would hide its products from the mode
        o, _ = reference.forward(detached, boundaries)
        grads = reference.backward(weights_of(o), detached, boundaries)
    return exact, relative_errors([o, *grads[:5]], exact)


def assert_within_budget(inputs, impl, **kwargs):
    exact, budget = exact_and_budget(inputs, **kwargs)
    got = relative_errors(run(gated_delta_rule, inputs, impl=impl, **kwargs), exact)
    assert all(got[name] <= 2 * budget[name] for name in got), (got, budget)


@pytest.mark.parametrize("decay", [SLOW, FAST])
@pytest.mark.parametrize("G", [16, 32, 48])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_error_is_within_twice_that_of_the_reference_with_rounded_operands(impl, lengths, G, decay):
    inputs = make_inputs(sum(lengths) + 9, heads=(16, G), decay=decay)
    assert_within_budget(inputs, impl, sequences=Sequences.from_lengths(lengths, total=sum(lengths) + 9).to("cuda"))


@pytest.mark.parametrize("gates", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_gates_of_either_dtype(impl, gates):
    inputs = make_inputs(83, gates=gates)
    sequences = Sequences.from_lengths([5, 1, 70, 7]).to("cuda")
    assert_within_budget(inputs, impl, sequences=sequences)
    grads = run(gated_delta_rule, inputs, sequences=sequences, impl=impl)[1:]
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]


def test_half_precision(impl):
    assert_within_budget(make_inputs(200, dtype=torch.float16), impl)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"qk_l2norm": False}])
def test_scale_and_normalisation(impl, options):
    assert_within_budget(short_keys(make_inputs(200)), impl, **options)


def short_keys(inputs):
    """Unnormalised keys of length above 1 make the recurrence itself diverge."""
    with torch.no_grad():
        inputs[1] /= 16
    return inputs


def test_the_decay_of_a_single_token_has_no_gradient(impl):
    inputs = make_inputs(2)
    sequences = Sequences.from_lengths([1, 1]).to("cuda")
    exact, budget = exact_and_budget(inputs, sequences=sequences)
    results = run(gated_delta_rule, inputs, sequences=sequences, impl=impl)
    errors = relative_errors(results, exact)
    assert all(errors[name] <= 2 * budget[name] for name in errors if name != "g"), (errors, budget)
    assert results[4].count_nonzero() == 0


@pytest.mark.parametrize("decay", [-20.0, -1e4, -math.inf])
def test_strong_decay_stays_finite_and_within_budget(impl, decay):
    inputs = make_inputs(130)
    with torch.no_grad():
        inputs[3][:, ::3] = decay
    assert all(x.isfinite().all() for x in run(gated_delta_rule, inputs, impl=impl))
    assert_within_budget(inputs, impl)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 63), (3, 65), (1, 1000)])
def test_without_sequences_each_row_is_one_document(impl, batch, tokens):
    inputs = make_inputs(tokens, batch=batch)
    got = run(gated_delta_rule, inputs, impl=impl)
    described = Sequences.from_lengths([tokens] * batch).to("cuda")
    for x, y in zip(got, run(gated_delta_rule, inputs, sequences=described, impl=impl), strict=True):
        assert torch.equal(x, y)
    assert_within_budget(inputs, impl)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("document", [0, 1, -1])
def test_gradient_reaches_no_other_document(impl, lengths, document):
    inputs = make_inputs(sum(lengths) + 9)
    o = gated_delta_rule(
        *inputs, sequences=Sequences.from_lengths(lengths, total=sum(lengths) + 9).to("cuda"), impl=impl
    )
    begin = sum(lengths[:document]) if document >= 0 else sum(lengths) - lengths[-1]
    own = slice(begin, begin + lengths[document])
    grads = torch.autograd.grad(o[:, own].square().sum(), inputs)
    for name, grad in zip(NAMES, grads, strict=True):
        assert lengths[document] == 1 or grad[:, own].abs().max() > 0, name
        assert grad[:, : own.start].count_nonzero() == 0, name
        assert grad[:, own.stop :].count_nonzero() == 0, name


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_changing_a_document_leaves_the_others_bit_identical(impl, lengths):
    sequences = Sequences.from_lengths(lengths).to("cuda")
    changed = len(lengths) // 2
    begin = sum(lengths[:changed])
    own = slice(begin, begin + lengths[changed])
    inputs = make_inputs(sum(lengths))
    perturbed = [x.detach().clone() for x in inputs]
    for x in perturbed:
        x[:, own] = x[:, own] * 0.5
    before = run(gated_delta_rule, inputs, sequences=sequences, impl=impl)
    after = run(gated_delta_rule, [x.requires_grad_() for x in perturbed], sequences=sequences, impl=impl)
    for name, x, y in zip(("o", *NAMES), before, after, strict=True):
        assert not torch.equal(x[:, own], y[:, own]), name
        assert torch.equal(x[:, : own.start], y[:, : own.start]), name
        assert torch.equal(x[:, own.stop :], y[:, own.stop :]), name


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_nan_stays_inside_its_document(impl, lengths):
    sequences = Sequences.from_lengths(lengths).to("cuda")
    changed = len(lengths) // 2
    begin = sum(lengths[:changed])
    own = slice(begin, begin + lengths[changed])
    inputs = make_inputs(sum(lengths))
    before = run(gated_delta_rule, inputs, sequences=sequences, impl=impl)
    with torch.no_grad():
        for x in inputs:
            x[:, own] = math.nan
    after = run(gated_delta_rule, inputs, sequences=sequences, impl=impl)
    unaffected = ("o",) if impl == "fla" else ("o", *NAMES)  # FLA multiplies what it masks in its backward
    for name, x, y in zip(("o", *NAMES), before, after, strict=True):
        if name in unaffected:
            assert torch.equal(x[:, : own.start], y[:, : own.start]), name
            assert torch.equal(x[:, own.stop :], y[:, own.stop :]), name


def library_directly(impl, inputs, cu_seqlens, *, qk_l2norm):
    if impl == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        options = {}
    else:
        from flash_qla import chunk_gated_delta_rule

        options = {"auto_cp": False}
    options |= {"cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": qk_l2norm}
    return run(lambda *x: chunk_gated_delta_rule(*x, **options)[0], inputs)


@pytest.mark.parametrize("G", [16, 32])
def test_equals_the_library_called_directly_bit_for_bit(impl, G, monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "0")  # FLA's own kernels, where it would call FlashQLA
    inputs = make_inputs(83, heads=(16, G))
    with torch.no_grad():
        for x in inputs[:2]:
            x.copy_(torch.nn.functional.normalize(x, dim=-1))
    cu_seqlens = torch.tensor([0, 5, 6, 76, 83], dtype=torch.int32, device="cuda")
    direct = library_directly(impl, inputs, cu_seqlens, qk_l2norm=False)
    sequences = Sequences.from_lengths([5, 1, 70, 7]).to("cuda")
    got = run(gated_delta_rule, inputs, sequences=sequences, qk_l2norm=False, impl=impl)
    for name, x, y in zip(("o", *NAMES), got, direct, strict=True):
        assert torch.equal(x, y), name


def test_empty_documents_and_no_tokens(impl):
    inputs = make_inputs(12)
    repeated = Sequences.from_cu_seqlens(torch.tensor([0, 0, 5, 5, 12, 12])).to("cuda")
    plain = Sequences.from_lengths([5, 7]).to("cuda")
    assert torch.equal(
        gated_delta_rule(*inputs, sequences=repeated, impl=impl), gated_delta_rule(*inputs, sequences=plain, impl=impl)
    )
    none = make_inputs(0)
    gated_delta_rule(*none, impl=impl).sum().backward()
    assert none[0].grad.shape == none[0].shape


def test_views_of_one_projection_and_an_expanded_gradient(impl):
    inputs = make_inputs(40)
    mixed = torch.cat([x.detach().flatten(2) for x in inputs[:3]], dim=-1)
    views = [x.unflatten(-1, (16, DIM)).requires_grad_() for x in mixed.split([16 * DIM] * 3, dim=-1)]
    assert not views[0].is_contiguous()
    o, expected = gated_delta_rule(*views, *inputs[3:], impl=impl), gated_delta_rule(*inputs, impl=impl)
    assert torch.equal(o, expected)
    grads = torch.autograd.grad(expected, inputs, torch.ones_like(expected))
    for x, y in zip(torch.autograd.grad(o.sum(), [*views, *inputs[3:]]), grads, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_backward_writes_into_nothing_it_is_given(impl, qk_l2norm):
    inputs = [x.detach() for x in short_keys(make_inputs(83))]
    sequences = Sequences.from_lengths([5, 1, 70, 7]).to("cuda")
    options = (None, DIM**-0.5, qk_l2norm, sequences.cu_seqlens_cpu, impl)
    o, q, k, *kept, _ = torch.ops.deltatune.gated_delta_rule(*inputs, *options)
    q, k = (q, k) if qk_l2norm else inputs[:2]
    given = [q, k, *inputs[2:], torch.ones_like(o), *kept]
    before = [x.clone() for x in given]
    arguments = (*given[:5], *options, given[5], None, *given[6:])
    first = torch.ops.deltatune.gated_delta_rule_backward(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    second = torch.ops.deltatune.gated_delta_rule_backward(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nothing_waits_for_the_device(impl):
    inputs = make_inputs(160)
    batches = [Sequences.from_lengths(x).to("cuda") for x in ([5, 1, 70, 7, 77], [60, 20, 40, 40], [30, 30, 50, 50])]

    def step(sequences):
        for _ in range(2):  # two layers
            o = gated_delta_rule(*inputs, sequences=sequences, impl=impl)
            torch.autograd.grad(o, inputs, torch.ones_like(o))

    step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sequences in batches[1:]:
            step(sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_opcheck(impl, qk_l2norm):
    inputs = short_keys(make_inputs(83))
    sequences = Sequences.from_lengths([5, 1, 70, 7]).to("cuda")
    options = (None, DIM**-0.5, qk_l2norm, sequences.cu_seqlens_cpu, impl)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    o, q, k, *kept, _ = torch.ops.deltatune.gated_delta_rule(*detached, *options)
    q, k = (q, k) if qk_l2norm else detached[:2]
    arguments = (q, k, *detached[2:], *options, torch.ones_like(o), None, *kept)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_compiles_whole_and_only_once_for_any_documents(impl):
    torch._dynamo.reset()
    library._documents.cache_clear()  # other tests have batches of these documents
    inputs = make_inputs(83)

    def two_layers(q, k, v, g, beta, sequences):
        o = gated_delta_rule(q, k, v, g, beta, sequences=sequences, impl=impl)
        return gated_delta_rule(q, k, o, g, beta, sequences=sequences, impl=impl)

    compiled = torch.compile(two_layers, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 1, 70, 7], [40, 43, 0, 0], [20] * 4 + [3]):
            sequences = Sequences.from_lengths(lengths).to("cuda")
            got = run(compiled, inputs, sequences=sequences)
            for x, y in zip(got, run(two_layers, inputs, sequences=sequences), strict=True):
                assert torch.equal(x, y)
    assert (
        library._documents.cache_info().misses == 3
    )  # once a batch: for both layers, forward and backward, compiled and not


def test_auto_takes_a_library_that_can_run(impl):
    inputs = make_inputs(83)
    chosen = choose(GatedDeltaRuleSpec(torch.device("cuda"), torch.bfloat16, head_dims=(DIM, DIM))).impl
    assert chosen in ("flash_qla", "fla")
    assert torch.equal(gated_delta_rule(*inputs), gated_delta_rule(*inputs, impl=chosen))
    assert choose(GatedDeltaRuleSpec(torch.device("cuda"), torch.float32)).impl == "reference"
