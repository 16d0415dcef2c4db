"""Stand-ins for quack's products that hold to what its kernels take on Hopper, in plain torch."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

__all__ = ["install"]


def install(monkeypatch) -> None:
    """Puts them where quack would be."""
    package, module = types.ModuleType("quack"), types.ModuleType("quack.gemm_interface")
    for function in (gemm, gemm_add, gemm_gated, gemm_dgated):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)


def taken(a: Tensor, b: Tensor, ends: Tensor, index: Tensor | None, *, along_rows: bool) -> None:
    """What the kernels assert, and what their loads need: 16 bytes of 16-bit elements."""
    assert ends.dtype == torch.int32
    assert ends[0] == 0
    assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
    assert (a.stride(-2), b.stride(-1)) == (1, 1) if along_rows else a.stride(-1) == 1
    assert along_rows or 1 in b.stride()[-2:]
    assert all(step == 1 or step % 8 == 0 for x in (a, b) for step in x.stride())


def interleaved(b: Tensor, layout: tuple[str, ...] | None) -> Tensor:
    """The halves of the dim whose elements are apart, by turns."""
    if layout is None:
        return b
    assert layout == ("B",)
    dim = -2 if b.stride(-1) == 1 else -1
    return b.index_select(dim, torch.arange(b.shape[dim]).view(2, -1).T.flatten())


def gemm(
    A,
    B,
    out=None,
    alpha=1.0,
    out_dtype=None,
    cu_seqlens_m=None,
    cu_seqlens_k=None,
    A_idx=None,
    concat_layout=None,
    tuned=True,
) -> Tensor:
    ends, by_rows = (cu_seqlens_m, True) if cu_seqlens_k is None else (cu_seqlens_k, False)
    taken(A, B, ends, A_idx, along_rows=not by_rows)
    B = interleaved(B, concat_layout)
    spans = [slice(*ends[i : i + 2].tolist()) for i in range(len(ends) - 1)]
    if by_rows:
        rows = A if A_idx is None else A[A_idx]
        found = rows.new_full((rows.shape[0], B.shape[-1]), float("nan"))  # past the last group nothing is written
        found[: ends[-1]] = torch.cat([rows[span] @ B[i] for i, span in enumerate(spans)])
    else:
        cols = A if A_idx is None else A[:, A_idx]
        found = torch.stack([cols[:, span] @ B[span] for span in spans])
    found = (alpha * found).to(out_dtype or A.dtype)
    return found if out is None else out.copy_(found)


def gemm_add(A, B, C, **options) -> Tensor:
    return gemm(A, B, **options) + C


def gemm_gated(A, B, C=None, activation=None, store_preact=True, **options) -> tuple[Tensor | None, Tensor]:
    assert activation == "swiglu"
    inner = gemm(A, B, **options) + (0 if C is None else C)
    return inner if store_preact else None, torch.nn.functional.silu(inner[:, ::2]) * inner[:, 1::2]


def gemm_dgated(
    A, B, PreAct, activation=None, colvec_scale=None, colvec_reduce=False, dynamic_scheduler=True, **options
) -> tuple[Tensor, ...]:
    """The derivative and what is stored of the gate are scaled, the sums are not."""
    assert activation == "swiglu"
    assert not (dynamic_scheduler and "A_idx" in options), "quack's own tuner has no such pair on Hopper"
    dh = gemm(A, B, **options)
    with torch.enable_grad():
        inner = PreAct.detach().requires_grad_()
        h = torch.nn.functional.silu(inner[:, ::2]) * inner[:, 1::2]
        (dinner,) = torch.autograd.grad(h, inner, dh * colvec_scale.unsqueeze(1))
    h = h.detach()
    return (dinner, h * colvec_scale.unsqueeze(1), *([(h * dh).sum(1)] if colvec_reduce else []))
