"""Dividing a graph into forward and backward under a memory budget, so that no random number is drawn twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["Partitioner", "partition"]

#: In place of a budget of 0, at which the partitioner keeps the graph's inputs alone, whatever must be saved.
_SMALLEST: Final = 1e-6


def partition(
    joint: fx.GraphModule, inputs: Sequence[object], *, budget: float, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Torch's own partitioner, told to save what random ops draw.

    Left to itself it computes a mask of dropout again like anything else, from another state of the generator. Without
    a budget it does not: it saves masks, and in a checkpointed layer draws them from the saved state.

    Args:
        joint: forward and backward as one graph; its random nodes are marked in place.
        inputs: of that graph.
        budget: the share of activations that may stay, from 0 to 1.
        **kwargs: as ``min_cut_rematerialization_partition`` takes them.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    drawn = [node for node in joint.graph.nodes if _is_random(node)] if budget < 1 else []
    for node in drawn:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with functorch_config.patch(activation_memory_budget=max(budget, _SMALLEST) if drawn else budget):
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)


class Partitioner(CustomPartitionerFn):
    """``partition`` under one budget, as Inductor takes it."""

    def __init__(self, budget: float) -> None:
        self._budget = budget

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        """Forward and backward of ``gm``."""
        return partition(gm, joint_inputs, budget=self._budget, **kwargs)

    def uuid(self) -> str:
        """What cached graphs depend on."""
        return f"deltatune: random results saved, budget {self._budget}"


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
