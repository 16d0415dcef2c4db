"""An optimizer over shards and plain weights at once: torch's loops over many tensors take one kind in a call."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["step_kinds_apart"]


def step_kinds_apart(optimizer: Optimizer) -> None:
    """Gives each group's shards and its other weights to ``step`` as two groups; between steps nothing is changed.

    So the groups that schedules set and checkpoints hold are the same, whatever lies in shards.
    """
    whole: list[list[dict[str, Any]]] = []

    def divide(optimizer: Optimizer, *_: Any) -> None:
        if whole:  # the step before raised
            join(optimizer)
        whole.append(optimizer.param_groups)
        optimizer.param_groups = [kind for group in optimizer.param_groups for kind in _kinds(group)]

    def join(optimizer: Optimizer, *_: Any) -> None:
        optimizer.param_groups = whole.pop()

    optimizer.register_step_pre_hook(divide)
    optimizer.register_step_post_hook(join)


def _kinds(group: dict[str, Any]) -> list[dict[str, Any]]:
    shards = [weight for weight in group["params"] if isinstance(weight, DTensor)]
    others = [weight for weight in group["params"] if not isinstance(weight, DTensor)]
    return [{**group, "params": weights} for weights in (shards, others) if weights]
