"""What the CUDA libraries share: one stream of tokens, q and k normalised once, and what is kept for backward."""

# B batch, T tokens, N = B * T, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule.documents import CHUNK_SIZE, Documents

__all__ = ["Results", "backward", "chunk_states_bytes", "forward", "results_like"]


# exp of it is 0 but for a denormal; the libraries subtract sums of g, which -inf turns into NaN and -1e4 into noise
_STRONGEST = -100.0


class Results(NamedTuple):
    """The output, and what backward takes in place of running forward again; unused tensors are ``[0]``."""

    o: Tensor  # [B, T, G, V]
    q: Tensor  # [B, T, H, K], normalised
    k: Tensor  # [B, T, H, K], normalised
    q_rstd: Tensor  # [B, T, H] fp32
    k_rstd: Tensor  # [B, T, H] fp32
    decay: Tensor  # [1, N, G] fp32, g summed inside each chunk
    solved: Tensor  # [1, N, G, 64], the inverse of each chunk's triangular system


def results_like(q: Tensor, k: Tensor, v: Tensor, *, qk_l2norm: bool, saves: bool) -> Results:
    """Uninitialised results of the right shapes and dtypes; with ``saves=False`` the output alone."""
    results = Results(v.new_empty(v.shape), *(v.new_empty(0) for _ in Results._fields[1:]))
    if not saves:
        return results
    stream = (1, v.shape[0] * v.shape[1], v.shape[2])
    decay, solved = v.new_empty(stream, dtype=torch.float32), k.new_empty((*stream, CHUNK_SIZE))
    results = results._replace(decay=decay, solved=solved)
    if not qk_l2norm:
        return results
    return results._replace(
        q=q.new_empty(q.shape),
        k=k.new_empty(k.shape),
        q_rstd=q.new_empty(q.shape[:3], dtype=torch.float32),
        k_rstd=k.new_empty(k.shape[:3], dtype=torch.float32),
    )


def forward(
    library: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    documents: Documents,
    *,
    scale: float,
    qk_l2norm: bool,
) -> Results:
    """Runs ``library.forward`` on the flattened stream; see ``deltatune.ops.gated_delta_rule`` for shapes."""
    if v.numel() == 0:
        return results_like(q, k, v, qk_l2norm=qk_l2norm, saves=True)
    results = results_like(q, k, v, qk_l2norm=False, saves=False)
    with torch.cuda.device(v.get_device()):
        if qk_l2norm:
            results = results._replace(**_normalised(q, k))
            q, k = results.q, results.k
        stream = [_stream(x) for x in (q, k, v, g.float().clamp(min=_STRONGEST), _gate(beta, v))]
        o, decay, solved = library.forward(*stream, documents, scale)
    return results._replace(o=o.to(v.dtype).view(v.shape), decay=decay, solved=solved)


def backward(
    library: ModuleType,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    decay: Tensor,
    solved: Tensor,
    documents: Documents,
    *,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the inputs of ``forward``, each like its input; q and k are the normalised ones."""
    inputs = (q, k, v, g, beta)
    if v.numel() == 0:
        dq, dk, dv, dg, dbeta = (x.new_zeros(x.shape) for x in inputs)
        return dq, dk, dv, dg, dbeta
    with torch.cuda.device(v.get_device()):
        do, q_, k_, v_, beta_ = (_stream(x) for x in (grad.to(v.dtype), q, k, v, _gate(beta, v)))
        grads = list(library.backward(do, q_, k_, v_, beta_, decay, solved, documents, scale))
        if qk_l2norm:
            from deltatune.ops._gated_delta_rule.l2_norm import normalise_backward

            grads[0] = normalise_backward(grads[0][0].contiguous(), q_[0], q_rstd.flatten(0, 1))
            grads[1] = normalise_backward(grads[1][0].contiguous(), k_[0], k_rstd.flatten(0, 1))
    dq, dk, dv, dg, dbeta = (y.to(x.dtype).reshape(x.shape).contiguous() for x, y in zip(inputs, grads, strict=True))
    return dq, dk, dv, dg, dbeta


def chunk_states_bytes(q: Tensor, v: Tensor) -> int:
    """The states in front of all chunks, ``[N / 64, G, K, V]``, as if no chunk were cut short."""
    return v.numel() * q.shape[-1] * v.itemsize // CHUNK_SIZE


def _normalised(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    from deltatune.ops._gated_delta_rule.l2_norm import normalise  # Triton, where it runs

    (unit_q, q_rstd), (unit_k, k_rstd) = normalise(q.flatten(0, 1)), normalise(k.flatten(0, 1))
    return {
        "q": unit_q.view(q.shape),
        "k": unit_k.view(k.shape),
        "q_rstd": q_rstd.view(q.shape[:3]),
        "k_rstd": k_rstd.view(k.shape[:3]),
    }


def _stream(x: Tensor) -> Tensor:
    """``[B, T, ...]`` to a contiguous ``[1, N, ...]``."""
    return x.reshape(1, -1, *x.shape[2:]).contiguous()


def _gate(beta: Tensor, v: Tensor) -> Tensor:
    """The libraries compile for the dtype of beta: its own where that is usual, otherwise fp32."""
    return beta if beta.dtype in (v.dtype, torch.float32) else beta.float()
