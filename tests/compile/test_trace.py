"""What a traced layer is said to keep, against what the compiled model hands to its backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from deltatune import CompileOptions, prepare
from deltatune.compile.trace import LayerMemory, _peak, trace_layer
from deltatune.ops._opaque import opaque
from deltatune.subclass import stock_class
from tiny import HYBRIDS, tiny_model

TOKENS = 192
SETTINGS = ("none", 0.75, 0.5, 0.25, "layer")


class SeenError(Exception):
    """Carries the arguments of a decoder layer's first call."""


def layer_call(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise SeenError(args, kwargs)

    handle = model.get_decoder().layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with pytest.raises(SeenError) as seen:
            model(input_ids=torch.ones(1, TOKENS, dtype=torch.long))
    finally:
        handle.remove()
    args, kwargs = seen.value.args
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs


@functools.cache
def traced(family: str) -> list[dict[Any, LayerMemory]]:
    model = model_of(family, "none")
    args, kwargs = layer_call(model)
    layers = model.get_decoder().layers
    return [trace_layer(stock_class(x).forward, x, args, kwargs, settings=SETTINGS) for x in layers]


def saved_bytes(model: Any) -> int:
    """Bytes of the storages that backward holds on to, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model(input_ids=torch.ones(1, TOKENS, dtype=torch.long)).logits.requires_grad
    return sum(kept.values())


def model_of(family: str, checkpointing: str | float) -> Any:
    # one of each kind
    model = tiny_model(family, layers=1 + (family in HYBRIDS), hidden_size=64, head_dim=32).train()
    prepare(model, compile=CompileOptions(backend="aot_eager"), checkpointing=checkpointing)
    return model


@pytest.mark.parametrize(
    ("family", "settings"),
    [pytest.param("qwen3_5", (0.5, "layer"), marks=pytest.mark.slow), ("qwen3_moe", ("none", 0.5))],
)
def test_what_layers_keep_is_predicted_to_the_byte(family: str, settings: tuple[str | float, ...]) -> None:
    predicted = traced(family)
    beyond = set()
    for setting in settings:
        kept = sum(layer[setting].kept for layer in predicted) + max(layer[setting].shared for layer in predicted)
        beyond.add(saved_bytes(model_of(family, setting)) - kept)
    # what the final norm and the head keep does not depend on the setting
    assert len(beyond) == 1
    assert 0 < beyond.pop() < 4 * TOKENS * 64 * 4


def test_the_less_may_stay_the_less_is_kept() -> None:
    for layer in traced("qwen3_5"):
        by_setting = [layer[setting] for setting in SETTINGS]
        assert [x.kept for x in by_setting] == sorted((x.kept for x in by_setting), reverse=True)
        assert layer["layer"].kept == TOKENS * 64 * 4
        assert all(x.backward_peak >= x.kept for x in by_setting)


def test_a_layer_that_cannot_be_traced_says_so() -> None:
    model = model_of("qwen3", "none")
    args, kwargs = layer_call(model)

    def broken(_module: nn.Module, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        torch._dynamo.graph_break()
        return hidden * 2

    from deltatune.compile.graphs import GraphBreakError

    with pytest.raises(GraphBreakError, match="does not compile as one graph"):
        trace_layer(broken, model, args, kwargs, settings=["none"])


def _pair_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@opaque(fake=_pair_fake, flops=lambda *_, **__: 1, workspace=lambda x: 10 * x.numel() * x.itemsize)
def _pair_for_a_test(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x + 2


def test_an_op_holds_its_arguments_all_its_results_and_its_workspace_at_once() -> None:
    graph = make_fx(lambda x: sum(_pair_for_a_test(x)), tracing_mode="fake")(torch.ones(100))
    assert _peak(graph, set()) == (1 + 2 + 10) * 400
