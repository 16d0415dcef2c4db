"""Settings of an optimizer whose state was loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from deltatune.errors import UserError
from deltatune.training.resuming import restore_settings, step_of


def built(lr: float, weight_decay: float, **others: Any) -> tuple[AdamW, LambdaLR]:
    """Two groups, the second without decay, and a schedule that falls by a tenth a step."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": weights[:1], "weight_decay": weight_decay}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=lr, **others)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 10)


def resumed(lr: float, weight_decay: float, **others: Any) -> tuple[AdamW, LambdaLR]:
    """Trained for three steps at 1.0 without decay, then loaded under other settings."""
    optimizer, schedule = built(1.0, 0.0)
    for _ in range(3):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    saved: Any = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = built(lr, weight_decay, **others)
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    restore_settings(optimizer, schedule, given)
    return optimizer, schedule


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_learning_rate_that_holds_now_is_at_the_step_of_the_schedule(lr: float) -> None:
    optimizer, schedule = resumed(lr, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.7 * lr] * 2)
    assert schedule.get_last_lr() == pytest.approx([0.7 * lr] * 2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.6 * lr] * 2)


def test_a_longer_schedule_acts_from_the_next_step() -> None:
    """A finished linear schedule ends at 0; twice as long, it is half-way down there."""
    optimizer, schedule = built(1.0, 0.0)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0, 0.0]
    saved: Any = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, _ = built(1.0, 0.0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 20)
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    restore_settings(optimizer, schedule, given)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("content", ['{"global_step": 3, "of_a_later_version": 1}', "[]", "{"])
def test_a_state_of_another_version_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match=r"trainer_state\.json cannot be read by transformers .*; install the version"):
        step_of(tmp_path)


def test_other_settings_are_those_of_the_groups_as_they_are_built() -> None:
    optimizer, _ = resumed(1.0, 0.5, betas=(0.5, 0.6), eps=0.25)
    assert [(group["betas"], group["eps"]) for group in optimizer.param_groups] == [((0.5, 0.6), 0.25)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert len(optimizer.state) == 1, "the moments stay"
