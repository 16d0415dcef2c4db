"""What a captured graph marks as recomputed in a checkpointed region."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from deltatune.compile.partition import recompute_functions


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.saved_tensors[0]


def layer(x: torch.Tensor) -> torch.Tensor:
    return Inner.apply(x.sin()).cos()


def captured(function: Any) -> torch.fx.GraphModule:
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(graph)
        return graph

    torch.compile(function, backend=backend, fullgraph=True)(torch.randn(3, requires_grad=True))
    return seen[0]


def marked(graph: torch.fx.GraphModule) -> list[str]:
    policy = CheckpointPolicy.PREFER_RECOMPUTE
    modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target) for m in modules for node in m.graph.nodes if node.meta.get("recompute") == policy]


def test_functions_in_a_checkpointed_region_are_marked() -> None:
    graph = captured(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert not any("exp" in name for name in marked(graph))
    recompute_functions(graph)
    assert sum("exp" in name for name in marked(graph)) == 1


def test_functions_anywhere_else_are_not() -> None:
    graph = captured(layer)
    recompute_functions(graph)
    assert marked(graph) == []
