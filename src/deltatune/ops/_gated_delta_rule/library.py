"""What the CUDA libraries share: one stream of tokens, q and k normalised once, and what is kept for backward."""

# B batch, T tokens, N = B * T, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule.documents import CHUNK_SIZE, documents_of
from deltatune.ops._gated_delta_rule.inputs import Gradients, Inputs
from deltatune.ops._gated_delta_rule.installed import Library

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


def results_like(inputs: Inputs, *, saves: bool) -> Results:
    """Uninitialised results of the right shapes and dtypes; with ``saves=False`` the output alone."""
    q, k, v = inputs[:3]
    results = Results(v.new_empty(v.shape), *(v.new_empty(0) for _ in Results._fields[1:]))
    if saves:
        stream = (1, v.shape[0] * v.shape[1], v.shape[2])
        decay, solved = v.new_empty(stream, dtype=torch.float32), k.new_empty((*stream, CHUNK_SIZE))
        results = results._replace(decay=decay, solved=solved)
    if saves and inputs.qk_l2norm:
        q_rstd, k_rstd = (x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k))
        results = results._replace(q=q.new_empty(q.shape), k=k.new_empty(k.shape), q_rstd=q_rstd, k_rstd=k_rstd)
    return results


def forward(library: Library, inputs: Inputs, cu_seqlens_cpu: Tensor) -> Results:
    """Runs the library's forward on the flattened stream."""
    q, k, v, g, beta = inputs[:5]
    if v.numel() == 0:
        return results_like(inputs, saves=True)
    results = results_like(inputs, saves=False)
    with torch.cuda.device(v.get_device()):
        if inputs.qk_l2norm:
            from deltatune.ops._gated_delta_rule.l2_norm import normalise  # Triton, where it runs

            (unit_q, q_rstd), (unit_k, k_rstd) = (normalise(x.flatten(0, 1)) for x in (q, k))
            q, k = unit_q.view(q.shape), unit_k.view(k.shape)
            q_rstd, k_rstd = (x.view(q.shape[:3]) for x in (q_rstd, k_rstd))
            results = results._replace(q=q, k=k, q_rstd=q_rstd, k_rstd=k_rstd)
        stream = _stream(q=q, k=k, v=v, g=g.float().clamp(min=_STRONGEST), beta=_gate(beta, v))
        found = library.run("forward", documents_of(cu_seqlens_cpu, v.device), **stream, scale=inputs.scale)
    return results._replace(o=found["o"].to(v.dtype).view(v.shape), decay=found["g"], solved=found["A"])


def backward(
    library: Library, grad: Tensor, inputs: Inputs, kept: tuple[Tensor, Tensor, Tensor, Tensor], cu_seqlens_cpu: Tensor
) -> Gradients:
    """The gradients of the inputs, of which q and k are the normalised ones; ``kept`` are the last of ``Results``."""
    q, k, v, _, beta = inputs[:5]
    q_rstd, k_rstd, decay, solved = kept
    if v.numel() == 0:
        return Gradients(*(x.new_zeros(x.shape) for x in inputs[:5]))
    with torch.cuda.device(v.get_device()):
        stream = _stream(q=q, k=k, v=v, beta=_gate(beta, v), do=grad.to(v.dtype))
        documents = documents_of(cu_seqlens_cpu, v.device)
        found = library.run("backward", documents, **stream, g=decay, A=solved, scale=inputs.scale)
        if inputs.qk_l2norm:
            from deltatune.ops._gated_delta_rule.l2_norm import normalise_backward

            for name, rstd in (("q", q_rstd), ("k", k_rstd)):
                dy = found[f"d{name}"][0].contiguous()
                found[f"d{name}"] = normalise_backward(dy, stream[name][0], rstd.flatten(0, 1))
    pairs = ((x, found[f"d{name}"]) for name, x in zip(Inputs._fields[:5], inputs[:5], strict=True))
    return Gradients(*(dx.to(x.dtype).reshape(x.shape).contiguous() for x, dx in pairs))


def chunk_states_bytes(q: Tensor, v: Tensor) -> int:
    """The states in front of all chunks, ``[N / 64, G, K, V]``, as if no chunk were cut short."""
    return v.numel() * q.shape[-1] * v.itemsize // CHUNK_SIZE


def _stream(**tensors: Tensor) -> dict[str, Tensor]:
    """``[B, T, ...]`` to contiguous ``[1, N, ...]``."""
    return {name: x.reshape(1, -1, *x.shape[2:]).contiguous() for name, x in tensors.items()}


def _gate(beta: Tensor, v: Tensor) -> Tensor:
    """The libraries compile for the dtype of beta: its own where that is usual, otherwise fp32."""
    return beta if beta.dtype in (v.dtype, torch.float32) else beta.float()
