"""What our graphs ask of the compiler beyond its settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from deltatune import CompileOptions
from deltatune.compile import Graphs
from deltatune.compiler_hooks import _whole_rows, recompute_functions


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


def persistent(width: int, hint: str) -> bool:
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    features = SimpleNamespace(
        reduction_numel=sympy.Integer(width), numel=sympy.Integer(1024), get_reduction_hint=lambda: ReductionHint[hint]
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        return bool(V.choices.should_use_persistent_reduction(features, False))


@pytest.mark.parametrize(
    ("width", "hint", "expected"), [(8192, "INNER", True), (8193, "INNER", False), (8192, "OUTER", False)]
)
def test_rows_that_fit_in_registers_are_read_once(width: int, hint: str, expected: bool) -> None:
    assert not persistent(width, hint)
    with _whole_rows():
        assert persistent(width, hint) == expected
    assert not persistent(width, hint)


def test_a_process_with_choices_of_its_own_keeps_them() -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Own(InductorChoices):
        pass

    with V.set_choices_handler(Own()), _whole_rows():
        assert type(V.choices) is Own


def test_forward_and_backward_are_lowered_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx
    from torch._inductor.virtualized import V

    seen, lower = [], compile_fx.compile_fx_inner

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(type(V.choices).__name__)
        return lower(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", record)
    graphs = Graphs(CompileOptions(options={"fx_graph_cache": False}), "none")
    module = torch.nn.RMSNorm(48)
    graphs.run("norm", lambda self, x: self.weight * x.sin(), module, torch.randn(2, 48)).sum().backward()
    assert seen == ["RowChoices", "RowChoices"]
    assert module.weight.grad is not None
