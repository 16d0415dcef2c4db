"""Keys with boundaries of their own, sinks and the log-sum-exp; and what torch's kernels are asked for."""

# T queries, U keys, N query heads, M key heads, D head dim

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltatune.ops import VarlenAttentionSpec, choose, varlen_attention
from deltatune.ops._varlen_attention import providers, torch_varlen
from deltatune.packing.sequences import Sequences

N, M, D = 4, 2, 8
PAIRS = {
    "equal": ([5, 1, 7], [5, 1, 7]),
    "more keys": ([5, 1, 7, 3], [9, 130, 7, 4]),
    "more queries": ([140, 3], [2, 1]),
    "without keys or queries": ([0, 4, 3, 0], [6, 0, 5, 0]),
    "blocks": ([63, 64, 65], [129, 64, 200]),
}


def make_inputs(lengths: list[int], key_lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + sum(key_lengths))
    shapes = [(1, sum(lengths), N, D), (1, sum(key_lengths), M, D), (1, sum(key_lengths), M, D), (N,)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in drawn]


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    window: int | None,
    lengths: list[int],
    key_lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Each sequence with all its scores at once; the last query sees the last key."""
    rows, logs = [], []
    for qd, kd, vd in zip(q[0].split(lengths), k[0].split(key_lengths), v[0].split(key_lengths), strict=True):
        kd, vd = (x.repeat_interleave(N // M, 1) for x in (kd, vd))
        scores = torch.einsum("tnd,und->ntu", qd, kd) * D**-0.5
        place = torch.arange(qd.shape[0]).unsqueeze(1) + kd.shape[0] - qd.shape[0] - torch.arange(kd.shape[0])
        hidden = (place < 0) if window is None else (place < 0) | (place >= window)
        extra = torch.full((N, 1, 1), -torch.inf, dtype=q.dtype) if sinks is None else sinks.view(N, 1, 1)
        scores = torch.cat([scores.masked_fill(hidden, -torch.inf), extra.expand(N, qd.shape[0], 1)], -1)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
        rows.append(torch.einsum("ntu,und->tnd", weights[..., :-1], vd))
        logs.append(lse)
    return torch.cat(rows)[None], torch.cat(logs, 1)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("lengths", "key_lengths"), PAIRS.values(), ids=PAIRS.keys())
def test_equals_dense_attention(lengths, key_lengths, window, with_sinks):
    q, k, v, sinks = make_inputs(lengths, key_lengths)
    options = {"sequences": Sequences.from_lengths(lengths), "kv_sequences": Sequences.from_lengths(key_lengths)}
    given = [q, k, v, sinks] if with_sinks else [q, k, v]
    found = varlen_attention(q, k, v, **options, window=window, sinks=sinks if with_sinks else None, return_lse=True)
    expected = dense(q, k, v, sinks if with_sinks else None, window, lengths, key_lengths)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    finite = expected[1].isfinite()  # the log of nothing has no gradient
    weights = torch.randn_like(found[0]), torch.randn_like(found[1][finite])
    grads = torch.autograd.grad((found[0], found[1][finite]), given, weights)
    wanted = torch.autograd.grad((expected[0], expected[1][finite]), given, weights)
    for name, x, y in zip(("q", "k", "v", "sinks"), grads, wanted, strict=False):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


def test_two_pieces_of_keys_are_joined_by_their_lse():
    """A document's last queries against its first and its last keys apart, as ranks of a ring hold them."""
    q, k, v, _ = make_inputs([70], [70])
    whole, whole_lse = varlen_attention(q, k, v, return_lse=True)
    late = q[:, 40:]
    # all of the first keys are before these queries: as if they stood at their end, one query a sequence
    ones = Sequences.from_lengths([1] * 30)
    first = [varlen_attention(late[:, i : i + 1], k[:, :40], v[:, :40], kv_sequences=Sequences.from_lengths([40]),
                              return_lse=True) for i in range(30)]  # fmt: skip
    assert ones.num_sequences == 30
    o1, lse1 = torch.cat([o for o, _ in first], 1), torch.cat([lse for _, lse in first], 1)
    o2, lse2 = varlen_attention(late, k[:, 40:], v[:, 40:], return_lse=True)
    lse = torch.logaddexp(lse1, lse2)
    joined = sum(o * (part - lse).exp().T[None, :, :, None] for o, part in ((o1, lse1), (o2, lse2)))
    torch.testing.assert_close(joined, whole[:, 40:])
    torch.testing.assert_close(lse, whole_lse[:, 40:])
    weights = torch.randn_like(joined)
    expected = torch.autograd.grad(whole[:, 40:], (q, k, v), weights)
    for x, y in zip(torch.autograd.grad(joined, (q, k, v), weights), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_the_dtypes_of_sinks_and_lse():
    q, k, v, sinks = make_inputs([9], [9], torch.bfloat16)
    o, lse = varlen_attention(q, k, v, sinks=sinks.detach().float().requires_grad_(), return_lse=True)
    assert (o.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (N, 9))
    (grad,) = torch.autograd.grad(varlen_attention(q, k, v, sinks=sinks).sum(), sinks)
    assert grad.dtype == torch.bfloat16


def test_opcheck():
    q, k, v, sinks = make_inputs([5, 0, 4], [7, 2, 4])
    queries, keys = Sequences.from_lengths([5, 0, 4]), Sequences.from_lengths([7, 2, 4])
    boundaries = (queries.cu_seqlens, queries.cu_seqlens_cpu, keys.cu_seqlens_cpu)
    args = (q[0], k[0], v[0], sinks, *boundaries, 0.25, None, "reference")
    torch.library.opcheck(torch.ops.deltatune.varlen_attention.default, args)


def test_one_graph_for_any_boundaries():
    q, k, v, sinks = make_inputs([12], [20])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k, v, sinks, sequences, kv_sequences):
        options = {"sequences": sequences, "kv_sequences": kv_sequences}
        return varlen_attention(q, k, v, **options, sinks=sinks, return_lse=True)

    for i, (lengths, key_lengths) in enumerate((([5, 7], [8, 12]), ([1, 4, 7], [1, 9, 10]))):
        described = [Sequences.from_lengths(x).static() for x in (lengths, key_lengths)]
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = layer(q, k, v, sinks, *described)
            grads = torch.autograd.grad(found, (q, k, v, sinks), [torch.ones_like(x) for x in found])
        expected = dense(q, k, v, sinks, None, lengths, key_lengths)
        wanted = torch.autograd.grad(expected, (q, k, v, sinks), [torch.ones_like(x) for x in expected])
        for x, y in zip((*found, *grads), (*expected, *wanted), strict=True):
            torch.testing.assert_close(x, y)


def test_what_does_not_fit_is_named():
    q, k, v, _ = make_inputs([5, 7], [9, 4])
    options = {"sequences": Sequences.from_lengths([5, 7]), "kv_sequences": Sequences.from_lengths([13])}
    with pytest.raises(ValueError, match="as many sequences as q has: expected 2, got 1"):
        varlen_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="sequences describe 12 tokens but the input holds"):
        varlen_attention(q, k, v, kv_sequences=Sequences.from_lengths([12]))
    with pytest.raises(ValueError, match="sinks has N=3 where 4 is expected"):
        varlen_attention(q, q, q, sinks=torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"lse": True}, "no gradient through lse"), ({"kv_sequences": True}, "one set of boundaries")],
)
def test_torchs_kernel_refuses_what_it_cannot(monkeypatch, extra, message):
    monkeypatch.setattr(torch_varlen, "refusal", lambda *_: None)
    plain = VarlenAttentionSpec(torch.device("cuda"), torch.bfloat16, 64)
    assert choose(plain).impl == "torch"
    with pytest.raises(ValueError, match=f"{message}.*; use impl='reference'"):
        choose(VarlenAttentionSpec(torch.device("cuda"), torch.bfloat16, 64, **extra), "torch")
    assert choose(VarlenAttentionSpec(torch.device("cuda"), torch.bfloat16, 64, **extra)).impl == "reference"


# torch's pair of operators on the CPU: what FlashAttention-2 computes, from the arguments that it takes


def _scores(q: Tensor, k: Tensor, scale: float, window_size: list[int]) -> Tensor:
    place = torch.arange(q.shape[0]).unsqueeze(1) - torch.arange(k.shape[0])
    left, right = window_size
    hidden = place > left if left >= 0 else torch.zeros_like(place, dtype=torch.bool)
    hidden |= place < -right if right >= 0 else False
    scores = torch.einsum("tnd,und->ntu", q, k.repeat_interleave(N // M, 1)) * scale
    return scores.masked_fill(hidden, -torch.inf)


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size, **_):
    lengths = cu_q.diff().tolist()
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == max(lengths)
    assert window_size[1] == 0 or is_causal
    rows, logs = [], []
    for qd, kd, vd in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = _scores(qd, kd, scale, window_size)
        rows.append(torch.einsum("ntu,und->tnd", scores.softmax(-1), vd.repeat_interleave(N // M, 1)))
        logs.append(scores.logsumexp(-1))
    return torch.cat(rows), torch.cat(logs, 1), None


def flash_backward(do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window_size):
    """Weights from ``lse`` and their mean gradient from ``o``, as the kernel has no other way."""
    del cu_k, max_q, max_k, is_causal, rng
    lengths, found = cu_q.diff().tolist(), []
    cut = [x.split(lengths) for x in (do, q, k, v, o)] + [lse.split(lengths, 1)]
    for dod, qd, kd, vd, od, lsed in zip(*cut, strict=True):
        weights = (_scores(qd, kd, scale, window_size) - lsed.unsqueeze(-1)).exp()
        dweights = torch.einsum("tnd,und->ntu", dod, vd.repeat_interleave(N // M, 1))
        dscores = weights * (dweights - (dod * od).sum(-1).T.unsqueeze(-1)) * scale
        dq = torch.einsum("ntu,und->tnd", dscores, kd.repeat_interleave(N // M, 1))
        dk, dv = torch.einsum("ntu,tnd->und", dscores, qd), torch.einsum("ntu,tnd->und", weights, dod)
        found.append((dq, *(x.unflatten(1, (M, N // M)).sum(2) for x in (dk, dv))))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.fixture
def flash(monkeypatch):
    """``impl="torch"`` runs on the CPU."""

    class Operators:
        _varlen_attn = staticmethod(flash_forward)
        _varlen_attn_backward = staticmethod(flash_backward)

    class Ops:
        torch_attn = Operators

    class Torch:
        ops = Ops

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(torch_varlen, "torch", Torch())
    monkeypatch.setattr(providers.torch_varlen, "refusal", lambda *_: None)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_torchs_kernels_are_asked_for_the_same_attention(flash, window, with_sinks):
    lengths = [5, 1, 9]
    q, k, v, sinks = make_inputs(lengths, lengths)
    given = [q, k, v, sinks] if with_sinks else [q, k, v]
    options = {"sequences": Sequences.from_lengths(lengths), "window": window, "sinks": sinks if with_sinks else None}
    found = varlen_attention(q, k, v, impl="torch", **options)
    expected = varlen_attention(q, k, v, impl="reference", **options)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, given, weights)
    for x, y in zip(torch.autograd.grad(found, given, weights), wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 33])
def test_cuda_sinks(window):
    lengths = [5, 1, 70, 7]
    q, k, v, sinks = (x.detach().cuda() for x in make_inputs(lengths, lengths, torch.bfloat16))
    given = [x.requires_grad_() for x in (q, k, v, sinks.float())]
    options = {"sequences": Sequences.from_lengths(lengths, device="cuda"), "window": window, "sinks": given[3]}
    found = varlen_attention(*given[:3], impl="torch", **options)
    wide = [x.detach().double().requires_grad_() for x in given]
    expected = varlen_attention(*wide[:3], impl="reference", **(options | {"sinks": wide[3]}))
    weights = torch.randn_like(found)
    grads = torch.autograd.grad(found, given, weights), torch.autograd.grad(expected, wide, weights.double())
    for x, y in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        assert (x.double() - y).norm() <= 2e-2 * y.norm()
