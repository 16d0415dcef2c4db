"""Where tokens go: rows sorted by expert, and slots that go nowhere behind them all, whatever their ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltatune import ops
from deltatune.ops import Adapter, ExpertLinear
from deltatune.ops._grouped_mm.routing import route

X, H, I, R = 3, 8, 6, 2  # noqa: E741
#: As transformers, DeepEP and nobody mark an absent slot.
ABSENT = [X, -1, X + 5, -7]


@pytest.mark.parametrize("absent", ABSENT)
def test_absent_slots_come_last_and_are_no_expert_s(absent: int) -> None:
    index = torch.tensor([[1, absent], [absent, absent], [2, 1], [absent, 1]])
    found = route(index, X)
    assert found.offsets.dtype == torch.int32
    assert found.offsets.tolist() == [0, 3, 4], "rows of expert 0, of 1 and of 2 end here"
    assert found.experts.tolist() == [1, 1, 1, 2, X, X, X, X]
    assert found.order.tolist() == [0, 5, 7, 4, 1, 2, 3, 6], "rows of one expert in the order of their tokens"
    assert found.place[found.order].tolist() == list(range(8))


def mixed(hidden: Tensor, index: Tensor, of: dict[str, Tensor]) -> Tensor:
    up, down = (
        ExpertLinear(of[name], of[f"{name}_bias"], [Adapter(of[f"{name}_A"], of[f"{name}_B"], 0.5)])
        for name in ("up", "down")
    )
    return ops.moe_experts(hidden, index, of["weights"], up, down, torch.nn.functional.silu)


def parts() -> dict[str, Tensor]:
    shapes = {"up": (X, I, H), "up_bias": (X, I), "up_A": (X, R, H), "up_B": (X, I, R), "down": (X, H, I)}
    shapes |= {"down_bias": (X, H), "down_A": (X, R, I), "down_B": (X, H, R), "weights": (4, 2)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("held", [float("nan"), float("inf"), 3.4e38])
@pytest.mark.parametrize("absent", ABSENT)
def test_a_token_that_goes_nowhere_may_hold_anything(absent: int, held: float) -> None:
    """As in the tail of a buffer that other ranks fill: neither outputs nor any gradient see it."""
    index = torch.tensor([[0, 1], [absent, absent], [2, absent], [1, 0]])
    hidden = torch.randn(4, H, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for value in (0.0, held):
        x = hidden.index_fill(0, torch.tensor([1]), value).requires_grad_()
        of = {name: tensor.requires_grad_() for name, tensor in parts().items()}
        y = mixed(x, index, of)
        grads = torch.autograd.grad(y.square().sum(), [x, *of.values()])
        outcomes.append([y, *grads])
    for of_tokens in outcomes[1][:2]:
        assert not of_tokens[1].any(), "exactly zero"
    for clean, found in zip(*outcomes, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-6)
