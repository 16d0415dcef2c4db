"""The delta rule with states on FLA and FlashQLA, forward and backward, against the reference in float64."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim, S sequences

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltatune import ops
from deltatune.layers import state_passing
from deltatune.ops import GatedDeltaRuleSpec, choose, gated_delta_rule
from deltatune.ops._gated_delta_rule import reference
from deltatune.ops._gated_delta_rule.reference import Inputs
from deltatune.packing.sequences import Sequences

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIM = 128
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
LENGTHS = {"mixed": [5, 0, 1, 70, 7], "long": [127, 257, 64, 0], "edges": [3, 2, 1, 63, 64, 65], "one": [200]}
SLOW, FAST = 0.05, 20.0
FINAL = 0.1  # of a state's gradient, next to that of o: some hundred tokens behind it give one like it, each 1 / K


@pytest.fixture(params=["fla", "flash_qla"])
def impl(request: pytest.FixtureRequest) -> str:
    spec = GatedDeltaRuleSpec(torch.device("cuda"), torch.bfloat16, head_dims=(DIM, DIM), state=True)
    try:
        choose(spec, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    name: str = request.param
    return name


def make_inputs(
    tokens: int,
    states: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (4, 8),
    dims: tuple[int, int] = (DIM, DIM),
    decay: float = SLOW,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """q, k, v, g, beta and initial states, leaves; g and the states are fp32."""
    (H, G), (K, V) = heads, dims
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, tokens, *x) for x in ((H, K), (H, K), (G, V), (G,), (G,))] + [(states, G, K, V)]
    q, k, v, g, beta, initial = (torch.randn(x, generator=generator, device="cuda") for x in shapes)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    given = [q.to(dtype), k.to(dtype), v.to(dtype), -decay * g.sigmoid(), beta.sigmoid().to(dtype), initial]
    return [x.requires_grad_() for x in given]


def results(function: Any, inputs: Sequence[Tensor], **kwargs: Any) -> list[Tensor]:
    """What the function returns, tokens first and then states, and the gradients of a weighted sum of it."""
    found = function(*inputs, **kwargs)
    generator = torch.Generator("cuda").manual_seed(1)
    # the same numbers whatever the dtype
    weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16().to(x.dtype) for x in found]
    weights[1:] = [FINAL * x for x in weights[1:]]
    return [*(x.detach() for x in found), *torch.autograd.grad(found, list(inputs), weights)]


def with_states(*inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    *rule, initial = inputs
    return gated_delta_rule(*rule, initial_state=initial, return_state=True, **kwargs)


class RoundedOperands(TorchFunctionMode):
    """Contractions of operands rounded to 16 bits, accumulated in fp32, as matrix units compute them.

    Besides matrix products, that of a state S and the gradient of the one behind it, ``sum of S * dS'``, which is the
    gradient of the decay of a chunk: a library reads both from where its products read them. With ``stored`` results
    of matrix products are rounded too, as those of torch in 16 bits are.
    """

    def __init__(self, dtype: torch.dtype, state: torch.Size, stored: bool) -> None:
        super().__init__()
        self.dtype, self.stored = dtype, stored
        self.state = state  # [K, V], which no chunk of tokens has

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if func not in products and not (func in (torch.Tensor.__mul__, torch.Tensor.mul) and self.is_of_states(args)):
            return func(*args, **(kwargs or {}))
        result = func(*(x.to(self.dtype).to(x.dtype) for x in args))
        return result.to(self.dtype).to(result.dtype) if self.stored and func in products else result

    def is_of_states(self, args: Any) -> bool:
        return all(isinstance(x, Tensor) and x.shape[-2:] == self.state for x in args)


class Plain(torch.autograd.Function):
    """The chunked reference with rounded operands; the op would hide its products from the mode."""

    @staticmethod
    def forward(ctx: Any, boundaries: Tensor, options: tuple[float, bool], stored: bool, *tensors: Tensor) -> Any:
        ctx.given, ctx.stored = (Inputs(*tensors, *options), boundaries), stored
        with RoundedOperands(tensors[0].dtype, tensors[5].shape[-2:], stored):
            return reference.forward(*ctx.given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, final_grad: Tensor) -> Any:
        inputs, boundaries = ctx.given
        with RoundedOperands(inputs.q.dtype, inputs.initial_state.shape[-2:], ctx.stored):
            return None, None, None, *reference.backward(grad, inputs, boundaries, final_grad)


def plain(*rule: Tensor, initial_state: Tensor, stored: bool, **kwargs: Any) -> Any:
    """As ``gated_delta_rule`` with ``return_state=True``."""
    q, sequences = rule[0], kwargs.get("sequences")
    boundaries = torch.arange(q.shape[0] + 1) * q.shape[1] if sequences is None else sequences.cu_seqlens_cpu
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    return Plain.apply(boundaries, (scale, kwargs.get("qk_l2norm", True)), stored, *rule, initial_state)


def plain_with_states(*inputs: Tensor, **kwargs: Any) -> Any:
    return plain(*inputs[:-1], initial_state=inputs[-1], **kwargs)


def relative_errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative to the norm of what is exact, or absolute where that is zero."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, exact, strict=True)]
    return [((a - b).norm() / (1.0 if is_zero(b) else b.norm())).item() for a, b in pairs]


def assert_within_twice(
    names: Sequence[str], got: Sequence[Tensor], exact: Sequence[Tensor], of_plain: Callable[[bool], Sequence[Tensor]]
) -> None:
    """Every error is at most twice that of plain torch with operands rounded to the same 16 bits.

    That of the decay's gradient is held to plain torch in 16 bits: the libraries sum ``q . dq - k . dk`` for it, of
    gradients made from states, values and their gradients that they store in 16 bits.

    Args:
        names: of the tensors.
        got: of a library.
        exact: in float64. What is zero there must be zero.
        of_plain: the same of ``plain``, by its ``stored``.
    """
    rounded, stored = (relative_errors(of_plain(x), exact) for x in (False, True))
    rows, holds = [], True
    for name, error, x, y, zero in zip(
        names, relative_errors(got, exact), rounded, stored, map(is_zero, exact), strict=True
    ):
        bound = 0.0 if zero else 2 * (y if name == "dg" else x)
        rows.append(f"{name}: error {error:.2e}, bound {bound:.2e}{'' if error <= bound else '  <- beyond'}")
        holds &= error <= bound
    assert holds, "\n".join(rows)


def is_zero(x: Tensor) -> bool:
    return not x.any()


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def check(inputs: list[Tensor], impl: str, **kwargs: Any) -> None:
    exact = results(with_states, doubled(inputs), impl="reference", **kwargs)
    got = results(with_states, inputs, impl=impl, **kwargs)
    assert got[1].dtype == torch.float32
    assert [x.dtype for x in got[2:]] == [x.dtype for x in inputs]
    assert_within_twice(NAMES, got, exact, lambda stored: results(plain_with_states, inputs, stored=stored, **kwargs))


@pytest.mark.parametrize("decay", [SLOW, FAST])
@pytest.mark.parametrize("G", [4, 8, 12])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_documents_begin_and_end_with_their_states(impl: str, lengths: list[int], G: int, decay: float) -> None:
    tokens = sum(lengths) + 9
    sequences = Sequences.from_lengths(lengths, total=tokens).to("cuda")
    inputs = make_inputs(tokens, sequences.num_sequences, heads=(4, G), decay=decay)
    check(inputs, impl, sequences=sequences)


@pytest.mark.parametrize("G", [4, 8])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 63), (3, 65), (2, 500)])
def test_rows_begin_and_end_with_their_states(impl: str, batch: int, tokens: int, G: int) -> None:
    check(make_inputs(tokens, batch, batch=batch, heads=(4, G)), impl)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"qk_l2norm": False}, {"scale": 1.0, "qk_l2norm": False}])
def test_scale_and_normalisation(impl: str, options: dict[str, Any]) -> None:
    check(make_inputs(130, 2, batch=2), impl, **options)


def test_half_precision(impl: str) -> None:
    check(make_inputs(130, 2, batch=2, dtype=torch.float16), impl)


def test_other_head_dims_on_fla(impl: str) -> None:
    if impl != "fla":
        pytest.skip("FlashQLA takes head dims of 128 alone")
    check(make_inputs(130, 2, batch=2, dims=(96, 128)), impl)


@pytest.mark.parametrize("decay", [-20.0, -1e4, -math.inf])
def test_a_strong_decay_forgets_the_state(impl: str, decay: float) -> None:
    inputs = make_inputs(130, 2, batch=2)
    with torch.no_grad():
        inputs[3][:, ::3] = decay
    assert all(x.isfinite().all() for x in results(with_states, inputs, impl=impl))
    check(inputs, impl)


@pytest.mark.parametrize("kept", [0, 1])
def test_the_gradient_of_one_result_alone(impl: str, kept: int) -> None:
    inputs = make_inputs(130, 2, batch=2)

    def alone(function: Any, leaves: list[Tensor], **kwargs: Any) -> list[Tensor]:
        return results(lambda *x: function(*x, **kwargs)[kept : kept + 1], leaves)

    exact = alone(with_states, doubled(inputs), impl="reference")
    got = alone(with_states, inputs, impl=impl)
    names = (NAMES[kept], *NAMES[2:])
    assert_within_twice(names, got, exact, lambda stored: alone(plain_with_states, inputs, stored=stored))


def test_without_tokens_a_state_passes_through(impl: str) -> None:
    inputs = make_inputs(12, 4)
    sequences = Sequences.from_lengths([5, 0, 7, 0], capacity=4).static().to("cuda")
    _, final, *_, dinitial = results(with_states, inputs, sequences=sequences, impl=impl)
    assert torch.equal(final[1::2], inputs[5][1::2])
    none = make_inputs(0, 1)
    _, final, *_, passed = results(with_states, none, impl=impl)
    assert torch.equal(final, none[5])
    assert passed.count_nonzero() == passed.numel()
    assert dinitial[1::2].count_nonzero() == dinitial[1::2].numel()


def test_two_pieces_equal_the_whole_within_the_rounding(impl: str) -> None:
    inputs = make_inputs(200, 1)

    def pieces(*given: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        *rule, initial = given
        head, middle = with_states(*(x[:, :130] for x in rule), initial, **kwargs)
        tail, final = with_states(*(x[:, 130:] for x in rule), middle, **kwargs)
        return torch.cat([head, tail], dim=1), final

    exact = results(with_states, doubled(inputs), impl="reference")
    got = results(pieces, inputs, impl=impl)
    assert_within_twice(NAMES, got, exact, lambda stored: results(plain_with_states, inputs, stored=stored))


def test_a_nan_stays_inside_its_document(impl: str) -> None:
    lengths = [70, 66, 5]
    sequences, inputs = Sequences.from_lengths(lengths).to("cuda"), make_inputs(141, 3)
    before = with_states(*inputs, sequences=sequences, impl=impl)
    with torch.no_grad():
        for x in inputs[:5]:
            x[:, 70:136] = math.nan
        inputs[5][1] = math.nan
    o, final = with_states(*inputs, sequences=sequences, impl=impl)
    for own, other in ((o[:, :70], before[0][:, :70]), (o[:, 136:], before[0][:, 136:]), (final[::2], before[1][::2])):
        assert torch.equal(own, other)


def library_directly(impl: str, inputs: Sequence[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    if impl == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        options: dict[str, Any] = {}
    else:
        from flash_qla import chunk_gated_delta_rule

        options = {"auto_cp": False}
    options |= {"cu_seqlens": cu_seqlens, "output_final_state": True}
    return results(lambda *x: chunk_gated_delta_rule(*x[:5], initial_state=x[5], **options), inputs)


@pytest.mark.parametrize("G", [4, 8])
def test_equals_the_library_called_directly_bit_for_bit(impl: str, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_FLASH_QLA", "0")  # FLA's own kernels, where it would call FlashQLA
    inputs = make_inputs(83, 4, heads=(4, G))
    cu_seqlens = torch.tensor([0, 5, 6, 76, 83], dtype=torch.int32, device="cuda")
    direct = library_directly(impl, inputs, cu_seqlens)
    sequences = Sequences.from_lengths([5, 1, 70, 7]).to("cuda")
    got = results(with_states, inputs, sequences=sequences, qk_l2norm=False, impl=impl)
    assert [name for name, x, y in zip(NAMES, got, direct, strict=True) if not torch.equal(x, y)] == []


def test_nothing_waits_for_the_device(impl: str) -> None:
    inputs = make_inputs(160, 5)
    batches = [Sequences.from_lengths(x).to("cuda") for x in ([5, 1, 70, 7, 77], [60, 0, 20, 40, 40])]
    results(with_states, inputs, sequences=batches[0], impl=impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        o, final = with_states(*inputs, sequences=batches[1], impl=impl)
        torch.autograd.grad((o, final), inputs, (torch.ones_like(o), torch.ones_like(final)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_opcheck(impl: str) -> None:
    inputs = make_inputs(83, 4)
    cu_seqlens_cpu = Sequences.from_lengths([5, 1, 70, 7]).cu_seqlens_cpu
    options = (DIM**-0.5, True, cu_seqlens_cpu, impl)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    o, q, k, *kept, final = torch.ops.deltatune.gated_delta_rule(*detached, *options)
    arguments = (q, k, *detached[2:], *options, torch.ones_like(o), torch.ones_like(final), *kept)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_one_whole_graph_for_any_boundaries(impl: str) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(83, 4)
    compiled = torch.compile(with_states, fullgraph=True)
    for i, lengths in enumerate(([5, 1, 70, 7], [40, 43], [83, 0])):
        sequences = Sequences.from_lengths(lengths, capacity=4).static().to("cuda")
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = results(compiled, inputs, sequences=sequences, impl=impl)
        eager = results(with_states, inputs, sequences=sequences, impl=impl)
        assert [name for name, x, y in zip(NAMES, got, eager, strict=True) if not torch.equal(x, y)] == []


def test_auto_takes_the_library_that_it_takes_without_states(impl: str) -> None:
    del impl  # one of them runs
    specs = [GatedDeltaRuleSpec(torch.device("cuda"), torch.bfloat16, (DIM, DIM), state=x) for x in (False, True)]
    without, with_ = (choose(spec) for spec in specs)
    assert without.impl == with_.impl in ("flash_qla", "fla")
    inputs = make_inputs(130, 2, batch=2)
    for x, y in zip(with_states(*inputs), with_states(*inputs, impl=with_.impl), strict=True):
        assert torch.equal(x, y)


MAP_NAMES = ("reads", "M", "N", "dq", "dk", "dv", "dg", "dbeta")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value_dim", [DIM, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 8)])
@pytest.mark.parametrize("parts", [(70, 230), (300, 0), (0, 190)], ids=["two documents", "one", "begins anew"])
def test_the_map_of_a_rank(
    impl: str,
    parts: tuple[int, int],
    heads: tuple[int, int],
    value_dim: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``parts`` are the end of the document that is carried here, and the beginning of the last one."""
    torch._dynamo.reset()
    tokens = 300
    inputs = make_inputs(tokens, 1, heads=heads, dims=(DIM, value_dim))[:5]
    places = torch.arange(tokens, device="cuda")
    carried, last = places < parts[0], places >= parts[1]

    def map_of(*rule: Tensor, impl: str) -> Any:
        return state_passing._map_of_part(*rule, carried, last, impl)

    exact = results(map_of, doubled(inputs), impl="reference")
    got = results(torch.compile(map_of, fullgraph=True) if compiled else map_of, inputs, impl=impl)

    def of_plain(stored: bool) -> list[Tensor]:
        monkeypatch.setattr(ops, "gated_delta_rule", functools.partial(plain, stored=stored))
        return results(map_of, inputs, impl="")

    assert not is_zero(exact[2])
    assert_within_twice(MAP_NAMES, got, exact, of_plain)
