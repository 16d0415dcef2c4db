"""The experts on quack's products: their algebra, on stand-ins that keep to what quack's kernels take on Hopper."""

import pytest
import torch
from torch import Tensor

import quack_stand_in
from benchmarks import moe_cases, op_cases
from benchmarks.moe_cases import Sizes
from benchmarks.shapes import SHAPES

CPU = torch.device("cpu")
SIZES = Sizes(experts=5, top_k=2, hidden=32, inner=16)
SHAPE = SHAPES["tiny"]
RANK = 8


@pytest.fixture
def quack(monkeypatch) -> None:
    quack_stand_in.install(monkeypatch)
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
