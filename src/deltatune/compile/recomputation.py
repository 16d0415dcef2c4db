"""Full recomputation of checkpointed layers, also of what autograd functions compute in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["recompute_functions"]


def recompute_functions(graph: fx.GraphModule) -> None:
    """Marks what autograd functions compute in a checkpointed layer as recomputed, like all around it.

    torch before 2.13 marks only the nodes of the checkpointed graph itself, so the partitioner would keep every result
    of a function's forward, such as the projections of a layer with adapters.

    Args:
        graph: as Dynamo captured it; its nested graphs are marked in place.
    """
    for region in _called(graph, torch.ops.higher_order.tag_activation_checkpoint):
        for body in _called(region, torch.ops.higher_order.autograd_function_apply):
            for node in body.graph.nodes:
                if node.op.startswith("call_"):
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def _called(graph: fx.GraphModule, higher_order: Any) -> Iterator[fx.GraphModule]:
    """The first graph that each call of a higher-order operator takes, in nested graphs too."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for call in module.graph.find_nodes(op="call_function", target=higher_order):
                body = module.get_submodule(str(call.args[0].target))
                assert isinstance(body, fx.GraphModule)
                yield body
