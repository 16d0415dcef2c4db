"""Dividing a graph into forward and backward: what is computed again there, and what never is.

Under a memory budget no random number is drawn twice; in a checkpointed layer autograd functions are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils.checkpoint import CheckpointPolicy

from deltatune.ops._opaque import is_kept, is_never_kept, kernel_of, rebuilt_places

__all__ = ["Partitioner", "kept_results", "recompute_functions"]

#: In place of a budget of 0, at which the partitioner keeps the graph's inputs alone, whatever must be saved.
_SMALLEST: Final = 1e-6
_aten: Final = torch.ops.aten
#: Moves of data that cost a read and a write.
_MOVES: Final = (
    _aten.index.Tensor, torch.ops.prims.convert_element_type.default, _aten.clone.default, _aten._to_copy.default,
    _aten.constant_pad_nd.default,
)  # fmt: skip


class Partitioner(CustomPartitionerFn):
    """Torch's own partitioner under a budget (the share of activations that may stay), told what to save.

    Random results are saved, and those of ops that ask for it (``is_kept``) under every checkpointing.

    Rows that an op asks to have rebuilt are computed again in backward, which it would not do by itself: what an opaque
    op reads has to be written to memory a second time.

    Left to itself it computes a mask of dropout again like anything else, from another state of the generator. Without
    a budget it does not: it saves masks, and in a checkpointed layer draws them from the saved state.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        """Forward and backward of ``gm``, which is marked in place; both call kernels without a trip to autograd."""
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        seeded = torch.Tag.nondeterministic_seeded
        drawn = [node for node in gm.graph.nodes if self._budget < 1 and seeded in getattr(node.target, "tags", ())]
        saved = drawn + kept_results(gm.graph)
        for node in saved:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        _rebuild(gm)
        _compute_again(gm)
        budget = max(self._budget, _SMALLEST) if saved else self._budget
        with functorch_config.patch(activation_memory_budget=budget):
            divided: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
                gm, joint_inputs, **kwargs
            )
        for half in divided:
            for node in half.graph.nodes:
                if node.op == "call_function":
                    node.target = kernel_of(node.target)
            half.recompile()
        return divided

    def uuid(self) -> str:
        """What cached graphs depend on."""
        return f"deltatune: random and kept results saved, rows and decoded weights rebuilt, budget {self._budget}"


def kept_results(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a forward, or of a joint graph's forward half, whose results are never computed again."""
    of_backward: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or any(read in of_backward for read in node.all_input_nodes):
            of_backward.add(node)
        elif is_kept(node.target):
            found.append(node)
    return found


def _rebuild(gm: fx.GraphModule) -> None:
    """Marks what is between such an argument and what is kept: elementwise results and a gather at most."""
    for node in gm.graph.nodes:
        for place in rebuilt_places(node.target):
            waiting = [node.args[place]]
            while waiting:
                one = waiting.pop()
                if isinstance(one, fx.Node) and _is_cheap(one) and "recompute" not in one.meta:
                    # the forward's own, which the partitioner takes for the same
                    for twin in gm.graph.find_nodes(op="call_function", target=one.target):
                        if twin.args == one.args and twin.kwargs == one.kwargs:
                            twin.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                    # what rows are gathered from is kept
                    waiting += [] if one.target is torch.ops.aten.index.Tensor else one.all_input_nodes


def _compute_again(gm: fx.GraphModule) -> None:
    """Marks what no backward keeps, and its views, which would keep it."""
    found: set[object] = set()
    for node in gm.graph.nodes:
        if is_never_kept(node.target) or (_is_view(node) and node.args[0] in found):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            found.add(node)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "is_view", False)


def _is_cheap(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (
        torch.Tag.pointwise in tags or node.target in _MOVES or getattr(node.target, "is_view", False)
    )


def recompute_functions(graph: fx.GraphModule) -> None:
    """Marks what autograd functions compute in a checkpointed layer as recomputed, like all around it.

    torch before 2.13 marks only the nodes of the checkpointed graph itself, so the partitioner would keep every result
    of a function's forward, such as the projections of a layer with adapters. The graph is as Dynamo captured it; its
    nested graphs are marked in place.
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
