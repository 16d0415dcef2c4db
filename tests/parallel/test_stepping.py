"""An optimizer whose groups are divided within a step."""

from __future__ import annotations

import pytest
import torch

from deltatune.parallel.stepping import step_kinds_apart


def test_groups_are_joined_after_a_step_that_raised() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    groups = optimizer.param_groups
    step_kinds_apart(optimizer)

    def broken() -> float:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        optimizer.step(broken)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups is groups
    assert torch.equal(weight.detach(), torch.full((2,), 0.5))
