"""What our graphs ask of the compiler beyond its settings: full recomputation, and reductions that read a row once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["lower_with_whole_rows", "recompute_functions"]

#: Widest row that one program holds in registers: 8192 fp32 numbers of up to five tensors, on 256 threads or more.
_WIDEST_ROW: Final = 8192


def recompute_functions(graph: fx.GraphModule) -> None:
    """Marks what autograd functions compute in a checkpointed layer as recomputed, like all around it.

    torch before 2.13 marks only the nodes of the checkpointed graph itself, so the partitioner would keep every result
    of a function's forward, such as the projections of a layer with adapters.

    Args:
        graph: as Dynamo captured it; its nested graphs are marked in place.
    """
    for region in _called(graph, torch.ops.higher_order.tag_activation_checkpoint):
        for body in _function_bodies(region):
            for node in body.graph.nodes:
                if node.op.startswith("call_"):
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def lower_with_whole_rows(*args: Any, **kwargs: Any) -> Any:
    """Inductor's ``compile_fx_inner``, where a reduction along rows of up to 8192 numbers keeps each row in registers.

    Inductor by itself does so up to 1024 and otherwise reads a row twice, once to reduce it and once to use the result,
    which is what the backward of a norm does with four tensors. A process that set choices of its own keeps them. It
    wraps every graph's lowering, since a backward may be lowered later, on another thread.
    """
    from torch._inductor import compile_fx

    with _whole_rows():
        return compile_fx.compile_fx_inner(*args, **kwargs)


def _whole_rows() -> AbstractContextManager[Any]:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    if type(V.choices) is not InductorChoices:
        return nullcontext()
    choices: AbstractContextManager[Any] = V.set_choices_handler(_row_choices()())
    return choices


@functools.cache
def _row_choices() -> type[Any]:
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class RowChoices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            along_rows = features.get_reduction_hint() == ReductionHint.INNER
            if cooperative_reduction or not along_rows or not config.triton.persistent_reductions:
                return False
            return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _WIDEST_ROW))

    return RowChoices


def _called(graph: fx.GraphModule, higher_order: Any) -> Iterator[fx.GraphModule]:
    """The first graph that each call of a higher-order operator takes, wherever the call stands."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for call in module.graph.find_nodes(op="call_function", target=higher_order):
                body = module.get_submodule(str(call.args[0].target))
                assert isinstance(body, fx.GraphModule)
                yield body


def _function_bodies(region: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The forwards of the autograd functions in a graph; ``modules()`` holds those of nested ones too."""
    return _called(region, torch.ops.higher_order.autograd_function_apply)
