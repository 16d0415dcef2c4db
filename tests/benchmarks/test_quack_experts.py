"""The experts on quack's products: their algebra, on stand-ins that keep to what quack's kernels take on Hopper."""

import sys
import types

import pytest
import torch
from torch import Tensor

from benchmarks import moe_cases, op_cases
from benchmarks.moe_cases import Sizes
from benchmarks.shapes import SHAPES

CPU = torch.device("cpu")
SIZES = Sizes(experts=5, top_k=2, hidden=32, inner=16)
SHAPE = SHAPES["tiny"]
RANK = 8


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
    A, B, out=None, alpha=1.0, out_dtype=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, concat_layout=None
) -> Tensor:
    ends, by_rows = (cu_seqlens_m, True) if cu_seqlens_k is None else (cu_seqlens_k, False)
    taken(A, B, ends, A_idx, along_rows=not by_rows)
    B = interleaved(B, concat_layout)
    spans = [slice(*ends[i : i + 2].tolist()) for i in range(len(ends) - 1)]
    if by_rows:
        rows = A if A_idx is None else A[A_idx]
        found = torch.cat([rows[span] @ B[i] for i, span in enumerate(spans)])
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


@pytest.fixture
def quack(monkeypatch) -> None:
    package, module = types.ModuleType("quack"), types.ModuleType("quack.gemm_interface")
    for function in (gemm, gemm_add, gemm_gated, gemm_dgated):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def inputs(rank: int) -> dict[str, Tensor]:
    normal = op_cases.Run(CPU, torch.float64).draw(0)
    drawn = moe_cases.draw_weights(normal, SIZES)
    generator = torch.Generator().manual_seed(1)
    drawn |= moe_cases.draw_inputs(normal, generator, SIZES, 24, busiest=1, rank=rank)
    drawn["index"] = torch.where(drawn["index"] == 2, 4, drawn["index"])  # an expert without rows; a token may go twice
    return {name: x.double() if x.is_floating_point() else x for name, x in drawn.items()}


def variant(rank: int, sizes: Sizes = SIZES):
    name = "quack's products" if rank else "quack, gather and gate inside its products"
    return next(build for n, _, build in moe_cases.baselines(SHAPE, sizes, rank, {}, CPU) if n == name)


@pytest.mark.parametrize("trains", [("x",), ("x", "weights")])
@pytest.mark.parametrize("rank", [0, RANK])
def test_output_and_gradients_are_those_of_the_op(rank, trains, quack) -> None:
    factors = [f"{name}_{factor}" for name in ("up", "down") for factor in "AB" if rank]
    given = inputs(rank)
    wanted = [given[name].requires_grad_() for name in (*trains, *factors)]
    upstream = torch.randn(24, SIZES.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for function in (moe_cases.ours("reference", SIZES, rank), variant(rank)()):
        y = function(given)
        results.append([y.detach(), *torch.autograd.grad(y, wanted, upstream)])
    for name, exact, found in zip(("y", *trains, *factors), *results, strict=True):
        assert found.shape == exact.shape, name
        # factors' gradients are stored in float32
        allowed = 1e-6 if name in factors else 1e-12
        assert float((found - exact).norm() / exact.norm()) <= allowed, name


@pytest.mark.parametrize("rank", [0, RANK])
def test_forward_alone_keeps_nothing(rank, quack) -> None:
    given = inputs(rank)
    with torch.no_grad():
        exact, found = moe_cases.ours("reference", SIZES, rank)(given), variant(rank)()(given)
    assert not found.requires_grad
    torch.testing.assert_close(found, exact)


def test_what_quack_lacks_is_said() -> None:
    with pytest.raises(ValueError, match="quack's gates have no clamps"):
        variant(0, SIZES._replace(gpt_oss=True))()
    with pytest.raises(ImportError, match="quack"):
        variant(0)()
