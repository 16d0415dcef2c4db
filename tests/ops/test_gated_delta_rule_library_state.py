"""What the op does around a library whose kernels take states and give them, without a GPU."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim, S sequences

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune.layers.state_passing import _map_of_part
from deltatune.ops import GatedDeltaRuleSpec, choose, gated_delta_rule
from deltatune.ops._gated_delta_rule import fla, flash_qla, library, providers, reference
from deltatune.ops._gated_delta_rule.reference import Inputs
from deltatune.packing.sequences import Sequences

H, G, K, V = 2, 4, 8, 12
BF16 = torch.bfloat16


class FakeLibrary:
    """A library on the CPU: the reference, checked for what a library is promised of states."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.given: list[set[str]] = []

    def run(
        self,
        direction: str,
        found: library.Boundaries,
        *,
        scale: float,
        initial_state: Tensor,
        output_final_state: bool = False,
        dht: Tensor | None = None,
        **tensors: Tensor,
    ) -> dict[str, Any]:
        self.calls[direction] += 1
        self.given.append({"output_final_state"} if output_final_state else {"dht"} if dht is not None else set())
        for state in (initial_state, initial_state if dht is None else dht):
            assert state.is_contiguous()
            assert state.dtype == torch.float32
            assert state.shape[0] == len(found.cu_seqlens) - 1  # of no empty document
        rule = Inputs(*(tensors[name] for name in ("q", "k", "v", "g", "beta")), initial_state, scale, qk_l2norm=False)
        if direction == "backward":
            *grads, dh0 = reference.backward(tensors["do"], rule, found.cu_seqlens_cpu, dht)
            return {f"d{name}": grad for name, grad in zip(Inputs._fields, grads, strict=False)} | {"dh0": dh0}
        o, final = reference.forward(rule, found.cu_seqlens_cpu)
        solved = rule.k.new_ones(*rule.v.shape[:3], library.CHUNK_SIZE)
        return {"o": o, "g": rule.g + 0, "A": solved, "final_state": final}


class FakeNorm:
    """In place of the Triton kernels."""

    @staticmethod
    def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
        y, rstd = reference._normalise(x)
        return y.contiguous(), rstd.squeeze(-1)

    @staticmethod
    def normalise_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
        return (dy - y * (y * dy).sum(-1, keepdim=True)) * rstd.unsqueeze(-1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """The op with ``impl="fla"`` runs the fake library."""
    found = FakeLibrary()
    monkeypatch.setattr(providers.GatedDeltaRuleSpec, "load", lambda impl: SimpleNamespace(LIBRARY=found))
    monkeypatch.setitem(sys.modules, "deltatune.ops._gated_delta_rule.l2_norm", FakeNorm)
    monkeypatch.setattr(providers, "_library_refusal", lambda name, device, dtype: None)
    monkeypatch.setattr(fla, "dim_refusal", lambda *dims: None)
    return found


def make_inputs(tokens: int, states: int, *, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, *x) for x in ((H, K), (H, K), (G, V), (G,), (G,))] + [(states, G, K, V)]
    q, k, v, g, beta, initial = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (q, k / 4, v, -0.05 * g.sigmoid(), beta.sigmoid(), initial)]


def results(inputs: Sequence[Tensor], *, only: slice = slice(None), **kwargs: Any) -> list[Tensor]:
    """``o`` and the final state, or one of them, and the six gradients of a weighted sum of these."""
    *rule, initial = inputs
    found = gated_delta_rule(*rule, initial_state=initial, return_state=True, **kwargs)[only]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in found]
    return [*(x.detach() for x in found), *torch.autograd.grad(found, list(inputs), weights)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_l2norm", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 70, 7, 0], [0, 0, 83], [3, 2, 1, 63]])
def test_a_library_and_the_reference_agree_through_the_op(
    fake: FakeLibrary, lengths: list[int], qk_l2norm: bool
) -> None:
    sequences = Sequences.from_lengths(lengths, total=90, capacity=9).static()
    inputs = make_inputs(90, sequences.num_sequences)
    options: dict[str, Any] = {"sequences": sequences, "qk_l2norm": qk_l2norm}
    assert_close(results(inputs, impl="fla", **options), results(inputs, impl="reference", **options))
    assert fake.calls == {"forward": 1, "backward": 1}
    assert fake.given == [{"output_final_state"}, {"dht"}]


def test_rows_have_states_of_their_own(fake: FakeLibrary) -> None:
    inputs = make_inputs(30, 3, batch=3)
    assert_close(results(inputs, impl="fla"), results(inputs, impl="reference"))


@pytest.mark.parametrize(("only", "given"), [(slice(0, 1), set()), (slice(1, 2), {"dht"})])
def test_the_gradient_of_one_result_alone(fake: FakeLibrary, only: slice, given: set[str]) -> None:
    sequences = Sequences.from_lengths([5, 0, 7])
    inputs = make_inputs(12, 3)
    got = results(inputs, only=only, sequences=sequences, impl="fla")
    assert_close(got, results(inputs, only=only, sequences=sequences, impl="reference"))
    assert fake.given[1] == given


def test_states_of_other_dtypes_are_fp32_inside(fake: FakeLibrary) -> None:
    inputs = [x.detach().to(BF16).requires_grad_() for x in make_inputs(12, 2)]
    sequences = Sequences.from_lengths([5, 7])
    _, final, *grads = results(inputs, sequences=sequences, impl="fla")
    assert final.dtype == torch.float32
    assert [x.dtype for x in grads] == [BF16] * 6


def test_an_expanded_state_and_one_of_zeros(fake: FakeLibrary) -> None:
    *rule, initial = make_inputs(12, 1)
    expanded = initial.expand(2, G, K, V)
    sequences = Sequences.from_lengths([5, 7])
    assert_close(
        results([*rule, expanded], sequences=sequences, impl="fla"),
        results([*rule, expanded], sequences=sequences, impl="reference"),
    )
    got = gated_delta_rule(*rule, sequences=sequences, return_state=True, impl="fla")
    expected = gated_delta_rule(*rule, sequences=sequences, return_state=True, impl="reference")
    assert_close(list(got), list(expected))


def test_no_tokens_never_reach_a_library_and_the_state_passes_through(fake: FakeLibrary) -> None:
    inputs = make_inputs(0, 1)
    got = results(inputs, impl="fla")
    assert_close(got, results(inputs, impl="reference"))
    assert torch.equal(got[1], inputs[5])
    assert not fake.calls


@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_opcheck(fake: FakeLibrary, qk_l2norm: bool) -> None:
    inputs = make_inputs(13, 4)
    options = (0.5, qk_l2norm, Sequences.from_lengths([5, 1, 0, 7]).cu_seqlens_cpu, "fla")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    o, q, k, *kept, final = torch.ops.deltatune.gated_delta_rule(*detached, *options)
    q, k = (q, k) if qk_l2norm else detached[:2]
    for final_grad in (torch.ones_like(final), None):
        arguments = (q, k, *detached[2:], *options, torch.ones_like(o), final_grad, *kept)
        torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_opcheck_of_states_in_other_strides(fake: FakeLibrary) -> None:
    *rule, state = inputs = [x.detach() for x in make_inputs(13, 4)]
    transposed = state.mT.contiguous().mT
    options = (0.5, False, Sequences.from_lengths([5, 1, 0, 7]).cu_seqlens_cpu, "fla")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*rule, transposed, *options))
    o, _, _, *kept, _ = torch.ops.deltatune.gated_delta_rule(*inputs, *options)
    arguments = (*inputs, *options, torch.ones_like(o), transposed, *kept)
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_one_whole_graph_for_any_boundaries(fake: FakeLibrary) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(12, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(rule: list[Tensor], initial: Tensor, sequences: Sequences) -> Any:
        return gated_delta_rule(*rule, sequences=sequences, initial_state=initial, return_state=True, impl="fla")

    for i, lengths in enumerate(([5, 7], [1, 0, 4, 7])):
        sequences = Sequences.from_lengths(lengths, capacity=4).static()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            o, final = layer(inputs[:5], inputs[5], sequences)
            grads = torch.autograd.grad((o, final), inputs, (torch.ones_like(o), torch.ones_like(final)))
        options: Any = {"sequences": sequences, "initial_state": inputs[5], "return_state": True}
        expected = gated_delta_rule(*inputs[:5], impl="reference", **options)
        wanted = torch.autograd.grad(expected, inputs, [torch.ones_like(x) for x in expected])
        assert_close([o, final, *grads], [*expected, *wanted])
    assert fake.calls == {"forward": 2, "backward": 2}


@pytest.mark.parametrize(
    ("module", "forward", "backward"),
    [
        (fla, "g o A final_state initial_state g_input", "dq dk dv dbeta dg dh0 dA_log ddt_bias"),
        (flash_qla, "g A o h final_state cp_cache", "dq dk dv dbeta dg dh0"),
    ],
)
def test_functions_get_states_and_their_results_are_named(module: Any, forward: str, backward: str) -> None:
    given: list[dict[str, Any]] = []

    def function(names: str) -> Any:
        return lambda **arguments: given.append(arguments) or names.split()

    functions = {"forward": function(forward), "backward": function(backward)}
    called = replace(module.LIBRARY, load=lambda: functions, describe=None)
    documents = library.documents_of(torch.tensor([0, 5, 5, 12]), torch.device("cpu"))
    assert documents.document_indices.tolist() == [0, 2]
    inputs = dict.fromkeys(("q", "k", "v", "g", "beta", "scale"), 1)
    found = called.run("forward", documents, **inputs, initial_state=2, output_final_state=True)
    assert found == {name: name for name in ("g", "o", "A", "final_state")}
    assert given[0].items() >= {"initial_state": 2, "output_final_state": True}.items()
    found = called.run("backward", documents, **inputs, A=1, do=1, initial_state=2, dht=3)
    assert found == {name: name for name in ("dq", "dk", "dv", "dbeta", "dg", "dh0")}
    assert given[1].items() >= {"initial_state": 2, "dht": 3}.items()
    called.run("forward", documents, **inputs)
    called.run("backward", documents, **inputs, A=1, do=1)
    assert given[2].items() >= {"initial_state": None, "output_final_state": False}.items()
    assert given[3].items() >= {"initial_state": None, "dht": None}.items()


@pytest.mark.parametrize(
    ("head_dims", "expected"), [((128, 128), "flash_qla"), ((128, 64), "fla"), ((8, 12), "reference")]
)
def test_the_choice_with_states_is_the_one_without(
    monkeypatch: pytest.MonkeyPatch, head_dims: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(providers, "_library_refusal", lambda *_: None)
    without, with_ = (
        choose(GatedDeltaRuleSpec(torch.device("cuda"), BF16, head_dims, state=state)) for state in (False, True)
    )
    assert without.impl == with_.impl == expected
    assert with_.reason == f"{without.reason}, states in and out"


def test_the_map_of_a_rank_runs_on_the_library_that_is_named(fake: FakeLibrary) -> None:
    inputs = make_inputs(30, 1)[:5]
    places = torch.arange(30)
    found = {}
    for impl in ("fla", "reference"):
        q, k, v, g, beta = inputs
        made = _map_of_part(q, k, v, g, beta, places < 11, places >= 20, impl)
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in made]
        found[impl] = [*(x.detach() for x in made), *torch.autograd.grad(made, inputs, weights)]
    assert fake.calls == {"forward": 1, "backward": 1}
    assert_close(found["fla"], found["reference"])
