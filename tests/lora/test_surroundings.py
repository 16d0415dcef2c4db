"""Fused adapters among what others do to a model: compilers, hooks, deleted adapters, sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from deltatune import CompileOptions, prepare
from deltatune.compile import auto
from lora_cases import FEW, adapted, assert_gradients_close, assert_same_gradients, logits, packed_call, pair, relative

TRACED = CompileOptions(backend="aot_eager")


def scaled(*models: Any) -> None:
    """Writes the adapters in place, as an optimizer does."""
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)


@pytest.mark.parametrize(("ours", "scope"), [(None, "model"), (TRACED, "layer")])
def test_a_graph_that_another_compiles_sees_every_step(ours: CompileOptions | None, scope: str) -> None:
    fused, stock = pair("qwen3", target_modules=FEW, layers=1)
    prepare(fused, lora="fused", compile=ours)
    with torch.no_grad():
        logits(fused)
    run = fused
    if scope == "model":
        run = torch.compile(fused, backend="aot_eager")
    else:
        for layer in fused.get_base_model().model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        assert relative(logits(run), logits(stock)) < 1e-5
        scaled(fused, stock)
    assert relative(logits(run), logits(stock)) < 1e-5


def test_an_adapter_deleted_while_another_stands_in_for_it() -> None:
    fused, stock = pair("qwen3")
    for model in (fused, stock):
        torch.manual_seed(1)
        model.add_adapter("reference", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        logits(model)
        with torch.no_grad():
            model.set_adapter("reference")
            logits(model)
            model.delete_adapter("default")
    with torch.no_grad():
        assert relative(logits(fused), logits(stock)) < 1e-5


def _own_forward(module: nn.Module, seen: list[int]) -> None:
    plain = module.forward
    module.forward = lambda *args, **kwargs: seen.append(1) or plain(*args, **kwargs) * 0.5  # type: ignore[method-assign]


def _halved(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Inputs of the first layer need no gradient, and have none."""
    return tuple(None if gradient is None else gradient * 0.5 for gradient in gradients)


def _with_backward(module: nn.Module, seen: list[int]) -> None:
    module.register_full_backward_hook(lambda module, into, out: seen.append(1) or _halved(into))


HUNG: dict[str, Callable[[Any, list[int]], Any]] = {
    "forward hook": lambda m, seen: m.register_forward_hook(lambda m, args, y: seen.append(1) or y * 0.5),
    "pre-hook": lambda m, seen: m.register_forward_pre_hook(lambda m, args: seen.append(1) or (args[0] * 0.5,)),
    "backward hook": _with_backward,
    "backward pre-hook": lambda m, seen: m.register_full_backward_pre_hook(
        lambda m, out: seen.append(1) or _halved(out)
    ),
    "own forward": _own_forward,
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "the layer": lambda layer: layer,
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "lora_dropout": lambda layer: layer.lora_dropout["default"],
}


@pytest.mark.parametrize("ran", [False, True], ids=["at once", "after a forward"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HUNG)
def test_what_hangs_on_any_part_acts_whenever_it_came(kind: str, place: str, ran: bool) -> None:
    fused, stock = pair("qwen3")
    counts = []
    for model in (fused, stock):
        if ran:
            model(**packed_call()).loss.backward()
            model.zero_grad()
        layers = model.get_base_model().model.layers
        seen: list[int] = []
        for projection in (layers[0].self_attn.q_proj, layers[1].mlp.down_proj):
            HUNG[kind](PLACES[place](projection), seen)
        model(**packed_call()).loss.backward()
        counts.append(len(seen))
    assert counts[0] == counts[1] >= 1
    assert_gradients_close(fused, stock)


@pytest.mark.slow
def test_in_one_compiled_layer_of_several_too() -> None:
    fused, stock = pair("qwen3", target_modules=FEW)
    prepared = prepare(fused, lora="fused", compile=TRACED)
    hung = [("forward hook", "lora_B"), ("own forward", "base_layer"), ("forward hook", "the layer")]
    # the first before any forward, the others each beside those that came before
    for kind, place in hung:
        for model in (fused, stock):
            HUNG[kind](PLACES[place](model.get_base_model().model.layers[1].mlp.down_proj), [])
            model.zero_grad()
            model(**packed_call()).loss.backward()
        assert_gradients_close(fused, stock)
    assert prepared.compile_report is not None
    assert list(prepared.compile_report.graphs) == [
        "full_attention_Qwen3MLP",
        *(f"full_attention_Qwen3MLP (hooks {number})" for number in (1, 2, 3)),
    ]


def test_parametrised_bases_are_called() -> None:
    fused, stock = pair("qwen3")
    for model in (fused, stock):
        for layer in model.get_base_model().model.layers:
            parametrize.register_parametrization(layer.self_attn.k_proj.base_layer, "weight", nn.Tanh())
    assert_same_gradients(fused, stock)


def test_the_trace_that_auto_reads_is_that_of_the_fused_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: ("none",))
    predicted = []
    for setting in ("fused", "stock"):
        model = adapted("qwen3", dtype=torch.bfloat16, target_modules=FEW)
        choice = prepare(model, lora=setting, compile=TRACED, checkpointing="auto").decide_checkpointing(96)
        assert choice is not None
        predicted.append(choice.predicted_bytes)
    assert predicted[0] != predicted[1]
