"""The delta rule with a state that goes in and one that comes out."""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim, S sequences

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltatune.ops import gated_delta_rule
from deltatune.packing.sequences import Sequences

H, G, K, V = 2, 4, 8, 12


def make_inputs(tokens: int, *, batch: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(H, K), (H, K), (G, V), (G,), (G,)]
    q, k, v, g, beta = (torch.randn(batch, tokens, *x, generator=generator, dtype=torch.float64) for x in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, -0.05 * g.sigmoid(), beta.sigmoid())]


def make_state(sequences: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(sequences, G, K, V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def one_by_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document ``[T, ...]``, token by token."""
    unit_q, unit_k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    unit_q, unit_k = (x.repeat_interleave(G // H, dim=1) for x in (unit_q * K**-0.5, unit_k))
    rows = []
    for t in range(q.shape[0]):
        state = g[t].exp()[:, None, None] * state
        written = beta[t][:, None] * (v[t] - torch.einsum("gkv,gk->gv", state, unit_k[t]))
        state = state + torch.einsum("gk,gv->gkv", unit_k[t], written)
        rows.append(torch.einsum("gkv,gk->gv", state, unit_q[t]))
    return torch.stack(rows) if rows else v[:0], state


@pytest.mark.parametrize("lengths", [[5, 0, 70, 7], [0], [63, 64, 65], [1, 2, 3, 16, 17, 0, 129]])
def test_every_sequence_begins_with_its_state_and_ends_with_it(lengths):
    inputs, initial = make_inputs(sum(lengths)), make_state(len(lengths))
    sequences = Sequences.from_lengths(lengths) if sum(lengths) else Sequences.from_lengths(lengths, capacity=1)
    o, final = gated_delta_rule(*inputs, sequences=sequences, initial_state=initial, return_state=True)
    parts = zip(*(x[0].split(lengths) for x in inputs), initial, strict=True)
    rows, states = zip(*(one_by_one(*part) for part in parts), strict=True)
    torch.testing.assert_close(o[0], torch.cat(rows))
    torch.testing.assert_close(final, torch.stack(states))
    if not 0 < sum(lengths) < 200:
        return  # nothing to differentiate; too long for a graph of single tokens
    weights = torch.randn_like(o), torch.randn_like(final)
    got = torch.autograd.grad((o, final), (*inputs, initial), weights)
    expected = torch.autograd.grad((torch.cat(rows)[None], torch.stack(states)), (*inputs, initial), weights)
    for name, x, y in zip(("q", "k", "v", "g", "beta", "state"), got, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 16, 63, 64, 65, 129, 130])
def test_two_pieces_with_a_carried_state_equal_the_whole(cut):
    inputs, initial = make_inputs(130), make_state(1)
    o, final = gated_delta_rule(*inputs, initial_state=initial, return_state=True)
    first, second = ([x[:, part] for x in inputs] for part in (slice(0, cut), slice(cut, None)))
    head, middle = gated_delta_rule(*first, initial_state=initial, return_state=True)
    tail, end = gated_delta_rule(*second, initial_state=middle, return_state=True)
    joined = torch.cat([head, tail], 1)
    torch.testing.assert_close(joined, o)
    torch.testing.assert_close(end, final)
    weights = torch.randn_like(o), torch.randn_like(final)
    expected = torch.autograd.grad((o, final), (*inputs, initial), weights)
    for x, y in zip(torch.autograd.grad((joined, end), (*inputs, initial), weights), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_zeros_are_the_state_of_a_new_sequence():
    inputs = make_inputs(70, dtype=torch.float32)
    o, final = gated_delta_rule(*inputs, return_state=True)
    assert final.shape == (1, G, K, V)
    assert final.dtype == torch.float32
    torch.testing.assert_close(o, gated_delta_rule(*inputs))
    torch.testing.assert_close(gated_delta_rule(*inputs, initial_state=torch.zeros(1, G, K, V)), o)


def test_a_state_alone_can_be_trained_on():
    """No gradient comes to the output, and none of the second sequence's reaches the first one's inputs."""
    inputs, initial = make_inputs(12), make_state(2)
    sequences = Sequences.from_lengths([5, 7])
    _, final = gated_delta_rule(*inputs, sequences=sequences, initial_state=initial, return_state=True)
    dq, dk, *_, dinitial = torch.autograd.grad(final[1].square().sum(), (*inputs, initial))
    assert not dq.any()
    assert not dk[:, :5].any()
    assert dk[:, 5:].any()
    assert not dinitial[0].any()
    assert dinitial[1].any()


def test_rows_have_states_of_their_own_and_16_bits_keep_fp32_states():
    inputs, initial = make_inputs(9, batch=3, dtype=torch.bfloat16), make_state(3, torch.float32)
    o, final = gated_delta_rule(*inputs, initial_state=initial, return_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    for row in range(3):
        alone = gated_delta_rule(
            *(x[row : row + 1] for x in inputs), initial_state=initial[row : row + 1], return_state=True
        )
        torch.testing.assert_close(o[row], alone[0][0])
        torch.testing.assert_close(final[row], alone[1][0])
    (grad,) = torch.autograd.grad(final.sum(), initial)
    assert grad.dtype == torch.float32


def test_opcheck():
    inputs, sequences = make_inputs(12), Sequences.from_lengths([5, 0, 7])
    options = (make_state(3), 0.5, True, sequences.cu_seqlens_cpu, "reference")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*inputs, *options))


def test_opcheck_of_states_in_other_strides():
    """The results are contiguous, as their fakes say, where a state or a gradient is dense and transposed."""
    *rule, _ = inputs = [x.detach() for x in (*make_inputs(12), make_state(3))]
    transposed = torch.randn(3, G, V, K, dtype=torch.float64).mT
    options = (0.5, True, Sequences.from_lengths([5, 0, 7]).cu_seqlens_cpu, "reference")
    torch.library.opcheck(torch.ops.deltatune.gated_delta_rule.default, (*rule, transposed, *options))
    o, *_ = torch.ops.deltatune.gated_delta_rule(*inputs, *options)
    for state, final_grad in ((transposed, None), (inputs[5], transposed)):
        arguments = (*rule, state, *options, torch.ones_like(o), final_grad, *[o.new_empty(0)] * 4)
        torch.library.opcheck(torch.ops.deltatune.gated_delta_rule_backward.default, arguments)


def test_one_graph_for_any_boundaries():
    inputs, initial = make_inputs(12), make_state(4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(inputs, initial, sequences):
        return gated_delta_rule(*inputs, sequences=sequences, initial_state=initial, return_state=True)

    for i, lengths in enumerate(([5, 7], [1, 4, 7])):
        sequences = Sequences.from_lengths(lengths, capacity=4).static()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = layer(inputs, initial, sequences)
            grads = torch.autograd.grad(found, (*inputs, initial), [torch.ones_like(x) for x in found])
        expected = gated_delta_rule(*inputs, sequences=sequences, initial_state=initial, return_state=True)
        wanted = torch.autograd.grad(expected, (*inputs, initial), [torch.ones_like(x) for x in expected])
        for x, y in zip((*found, *grads), (*expected, *wanted), strict=True):
            torch.testing.assert_close(x, y)


def test_a_state_must_fit():
    inputs = make_inputs(12)
    with pytest.raises(ValueError, match=r"\[number of sequences, G, K, V\] = \[2, 4, 8, 12\], got \[1, 4, 8, 12\]"):
        gated_delta_rule(*inputs, sequences=Sequences.from_lengths([5, 7]), initial_state=make_state(1))
    with pytest.raises(ValueError, match="initial_state must be floating point"):
        gated_delta_rule(*inputs, initial_state=torch.zeros(1, G, K, V, dtype=torch.long))
