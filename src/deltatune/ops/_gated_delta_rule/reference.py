"""The specification: the gated delta rule in chunks (the WY form), forward and backward, from the inputs alone.

Written per chunk with ``D_ij = exp(sum of g over j < t <= i)`` for ``j <= i``, ``a_i = exp(sum of g over t <= i)``,
``z_i = exp(sum of g over t > i)``, the state S at the chunk's beginning and S' at its end::

    A    = strictly lower part of beta_i D_ij (k_i . k_j)
    U    = (I + A)^-1 (beta V - beta a K S)       the values that the delta rule really writes
    P    = D * (Q K^T)
    O    = a Q S + P U
    S'   = a_C S + (z K)^T U

Everything but the two lines that carry S is done for all chunks of all documents at once; the scan over S takes as
many steps as the longest document has chunks. Exponents are sums of g, never differences of such sums: they are
at most 0 whatever the decay, and lose nothing where a strong decay is followed by a weak one.
"""

# B batch, T tokens, H key heads, G value heads, K key dim, V value dim; n chunks of C tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule.chunks import Chunks, cut_into_chunks
from deltatune.ops._numerics import L2_EPS, accumulation_dtype

__all__ = ["Gradients", "Inputs", "backward", "forward"]


class Inputs(NamedTuple):
    """The arguments of ``deltatune.ops.gated_delta_rule``, validated."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, G, V]
    g: Tensor  # [B, T, G]
    beta: Tensor  # [B, T, G]
    initial_state: Tensor | None  # [number of sequences, G, K, V]
    scale: float
    qk_l2norm: bool


class Gradients(NamedTuple):
    """Each in the shape and dtype of its input."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None = None  # where there is one


def forward(inputs: Inputs, cu_seqlens_cpu: Tensor) -> tuple[Tensor, Tensor | None]:
    """``o`` like ``v``, and the final state where there is an initial one; see ``deltatune.ops.gated_delta_rule``."""
    initial_state, dtype = inputs.initial_state, accumulation_dtype(*inputs[:3])
    out = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    final = None if initial_state is None else _copy(initial_state, dtype)
    for chunks in cut_into_chunks(cu_seqlens_cpu, out.device):
        c = _prepare(chunks, inputs)
        initial = None if final is None else final[chunks.documents]
        states, updates = _scan(chunks, c, initial)
        later = _with_state(chunks, initial)
        o = c.p @ updates
        o[later] += (c.a[later] * c.q[later]) @ states
        chunks.scatter(o, out)
        if final is not None:
            last = chunks.lasts
            final[chunks.documents] = (c.z[last] * c.k[last]).mT @ updates[last] + c.a[last, :, -1:] * states[last]
    return out, final


def backward(grad: Tensor, inputs: Inputs, cu_seqlens_cpu: Tensor, final_grad: Tensor | None = None) -> Gradients:
    """The gradients of the inputs; the forward pass is run again.

    ``grad`` is that of ``o``, ``final_grad`` that of a final state, zeros if None. ``dX`` below is the gradient of X.
    The state's own gradient is scanned from the last chunk to the first::

        dU = P^T dO + z K dS'
        dS = (a Q)^T dO + a_C dS' - W^T dU          with W = (I + A)^-1 (beta a K)
    """
    q, k, v, _, _, initial_state, scale, qk_l2norm = inputs
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5]]
    dinitial = None
    if initial_state is not None:
        # of a sequence without tokens the final state is the initial one
        final_grad = torch.zeros_like(initial_state) if final_grad is None else final_grad
        dinitial = _copy(final_grad, accumulation_dtype(q, k, v))
    for chunks in cut_into_chunks(cu_seqlens_cpu, v.device):
        c = _prepare(chunks, inputs)
        initial = dfinal = None
        if initial_state is not None and dinitial is not None:
            initial, dfinal = initial_state[chunks.documents].to(dinitial.dtype), dinitial[chunks.documents]
        do = chunks.gather(grad).to(c.v.dtype)
        dq, dk, dv, dg, dbeta, dfirst = _chunk_gradients(chunks, c, do, initial, dfinal)
        if dinitial is not None and dfirst is not None:
            dinitial[chunks.documents] = dfirst
        dq, dk = _sum_groups(dq * scale, q.shape[2]), _sum_groups(dk, k.shape[2])
        if qk_l2norm:
            dq, dk = _normalise_backward(chunks.gather(q), dq), _normalise_backward(chunks.gather(k), dk)
        for chunked, out in zip((dq, dk, dv, dg, dbeta), grads, strict=True):
            chunks.scatter(chunked, out)
    found = Gradients(*grads)
    if initial_state is None or dinitial is None:
        return found
    return found._replace(initial_state=dinitial.to(initial_state.dtype))


def _copy(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous whatever the strides, as the op's fakes say."""
    return states.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _chunk_gradients(
    chunks: Chunks, c: _Prepared, do: Tensor, initial: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of the q, k, v, g and beta of ``_Prepared``, and of the initial states.

    ``initial`` and ``dfinal`` ``[firsts, G, K, V]`` are those of the documents: both or neither.
    """
    states, updates = _scan(chunks, c, initial)
    du, dpassed, dfirst = _scan_backward(chunks, c, do, dfinal)
    later = _with_state(chunks, initial)

    # (I + A) U = beta (V - a K S)
    dr = torch.linalg.solve_triangular(c.system.mT, du, upper=True, unitriangular=True)
    dv = c.beta * dr
    dbeta = (dr * c.v).sum(-1)
    dp, d_system = (do @ updates.mT).tril(), -(dr @ updates.mT).tril(-1)
    dbeta += (d_system * c.d * c.kk).sum(-1)
    d_system = c.beta * d_system

    # P = D * QK, A = beta D * KK below the diagonal
    dd = dp * c.qk + d_system * c.kk
    dqk, dkk = dp * c.d, d_system * c.d
    dq = dqk @ c.k
    dk = dqk.mT @ c.q + (dkk + dkk.mT) @ c.k

    # a Q S in O, and beta a K S
    ks, qs = c.k[later] @ states, c.q[later] @ states
    dbeta[later] -= (dr[later] * c.a[later] * ks).sum(-1)
    da = torch.zeros_like(dbeta)
    da[later] = (do[later] * qs).sum(-1) - (dv[later] * ks).sum(-1)
    dq[later] += (c.a[later] * do[later]) @ states.mT
    dk[later] -= (c.a[later] * dv[later]) @ states.mT

    # S' = a_C S + (z K)^T U
    if dfinal is None:
        before = chunks.before  # the chunks that pass a state on
        dzk = torch.zeros_like(dk).index_copy_(0, before, updates[before] @ dpassed.mT)
        inner = chunks.links[0][1].stop - chunks.firsts if chunks.links else 0  # the chunks before these have no state
        carried = before[inner:]
        da[carried, :, -1] += (states[carried - chunks.firsts] * dpassed[inner:]).sum((-2, -1))
    else:
        dzk = updates @ dpassed.mT
        da[..., -1] += (states * dpassed).sum((-2, -1))
    dk += c.z * dzk
    return dq, dk, dv, _decay_backward(c, dd, da, (c.k * dzk).sum(-1)), dbeta, dfirst


def _with_state(chunks: Chunks, initial: Tensor | None) -> slice:
    """The chunks that begin with a state: without initial states a document's first chunk begins with S = 0."""
    return slice(chunks.firsts if initial is None else 0, None)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What a chunk computes without knowing the state, in the accumulation dtype, for every value head."""

    q: Tensor  # [n, G, C, K], normalised and scaled
    k: Tensor  # [n, G, C, K], normalised
    v: Tensor  # [n, G, C, V]
    beta: Tensor  # [n, G, C, 1]
    a: Tensor  # [n, G, C, 1]
    z: Tensor  # [n, G, C, 1]
    d: Tensor  # [n, G, C, C], zero above the diagonal
    qk: Tensor  # [n, G, C, C]
    kk: Tensor  # [n, G, C, C]
    p: Tensor  # [n, G, C, C]
    system: Tensor  # I + A, [n, G, C, C]
    u: Tensor  # (I + A)^-1 beta V, [n, G, C, V]
    w: Tensor  # (I + A)^-1 beta a K, [n, G, C, K]


def _prepare(chunks: Chunks, inputs: Inputs) -> _Prepared:
    acc_dtype = accumulation_dtype(*inputs[:3])
    group = inputs.v.shape[2] // inputs.k.shape[2]
    q, k, v, g, beta = (chunks.gather(x).to(acc_dtype) for x in inputs[:5])
    if inputs.qk_l2norm:
        q, k = _normalise(q)[0], _normalise(k)[0]
    q, k = (x.repeat_interleave(group, dim=1) for x in (q * inputs.scale, k))
    beta = beta.unsqueeze(-1)

    exponents = _segment_sums(g)
    d = exponents.exp().tril()
    a, z = g.cumsum(-1).exp().unsqueeze(-1), d[..., -1, :].unsqueeze(-1)
    qk, kk = q @ k.mT, k @ k.mT
    system = (beta * d * kk).tril(-1) + torch.eye(d.shape[-1], dtype=acc_dtype, device=d.device)
    right = torch.cat([beta * v, beta * a * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return _Prepared(q, k, v, beta, a, z, d, qk, kk, d * qk, system, u, w)


def _segment_sums(g: Tensor) -> Tensor:
    """``[..., C]`` to ``[..., C, C]``: the sum of g over ``j < t <= i`` at (i, j), 0 where that is empty."""
    return g.unsqueeze(-1).expand(*g.shape, g.shape[-1]).tril(-1).cumsum(-2)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
    return x * inverse, inverse


def _scan(chunks: Chunks, c: _Prepared, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """S of every chunk that begins with one, ``[n, G, K, V]`` or ``[n - firsts, ...]``, and U, ``[n, G, C, V]``."""
    updates = c.u.clone()
    zk = (c.z * c.k).mT
    states = [updates.new_empty(0, updates.shape[1], c.k.shape[-1], updates.shape[-1])]
    if initial is not None:
        states = [initial]
        updates[: chunks.firsts] -= c.w[: chunks.firsts] @ initial
    for before, after in chunks.links:
        state = zk[before] @ updates[before]
        if initial is not None or before.start >= chunks.firsts:
            state += c.a[before, :, -1:] * states[-1][: state.shape[0]]
        updates[after] -= c.w[after] @ state
        states.append(state)
    return torch.cat(states), updates


def _scan_backward(
    chunks: Chunks, c: _Prepared, do: Tensor, dfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``dU`` ``[n, G, C, V]``, dS' of the chunks that pass a state on, and dS of first chunks where states go out.

    dS' is ``[n - firsts, G, K, V]`` in the order of ``chunks.before``; where states go out, ``[n, G, K, V]``.
    """
    du = c.p.mT @ do
    aq, zk = (c.a * c.q).mT, c.z * c.k
    if dfinal is not None:
        return _scan_backward_from(chunks, c, do, du, aq, zk, dfinal)
    dstates = [aq.new_empty(0, aq.shape[1], aq.shape[2], do.shape[-1])]
    for before, after in reversed(chunks.links):
        dstate = aq[after] @ do[after] - c.w[after].mT @ du[after]
        going_on = dstates[-1].shape[0]
        dstate[:going_on] += c.a[after, :, -1:][:going_on] * dstates[-1]
        du[before] += zk[before] @ dstate
        dstates.append(dstate)
    return du, torch.cat(dstates[::-1]), None


def _scan_backward_from(
    chunks: Chunks, c: _Prepared, do: Tensor, du: Tensor, aq: Tensor, zk: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dpassed = aq.new_zeros(*aq.shape[:3], do.shape[-1])
    dpassed[chunks.lasts] = dfinal
    du[chunks.lasts] += zk[chunks.lasts] @ dfinal
    for before, after in reversed([(None, slice(0, chunks.firsts)), *chunks.links]):
        dstate = aq[after] @ do[after] - c.w[after].mT @ du[after] + c.a[after, :, -1:] * dpassed[after]
        if before is not None:
            dpassed[before] = dstate
            du[before] += zk[before] @ dstate
    return du, dpassed, dstate


def _decay_backward(c: _Prepared, dd: Tensor, da: Tensor, dz: Tensor) -> Tensor:
    """The gradient of g ``[n, G, C]``: every sum of g that a token's g is part of passes its gradient on."""
    dd[..., -1, :] += dz  # z is the last row of D
    sums = (dd * c.d).tril(-1)
    from_segments = _reverse_cumsum(sums, -2).tril(-1).sum(-1)
    return from_segments + _reverse_cumsum(da * c.a.squeeze(-1), -1)


def _reverse_cumsum(x: Tensor, dim: int) -> Tensor:
    return x.flip(dim).cumsum(dim).flip(dim)


def _sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """The gradient of a key head is the sum over the value heads that read it: ``[n, G, C, K]`` to ``[n, H, C, K]``."""
    n, heads, *rest = x.shape
    return x.reshape(n, key_heads, heads // key_heads, *rest).sum(2)


def _normalise_backward(x: Tensor, dy: Tensor) -> Tensor:
    """``dx = (dy - y (y . dy)) * rsqrt(sum x^2 + eps)`` with ``y = x * rsqrt(sum x^2 + eps)``."""
    y, inverse = _normalise(x.to(dy.dtype))
    return (dy - y * (y * dy).sum(-1, keepdim=True)) * inverse
