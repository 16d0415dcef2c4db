"""Fused adapters among what others do to a model: compilers, hooks, deleted adapters, sharding."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from deltatune import CompileOptions, prepare
from lora_cases import adapted, logits, packed_call, pair, relative

TRACED = CompileOptions(backend="aot_eager")


def scaled(*models: Any) -> None:
    """Writes the adapters in place, as an optimizer does."""
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("ours", [None, TRACED])
def test_a_graph_that_another_compiles_sees_every_step(scope: str, ours: CompileOptions | None) -> None:
    fused, stock = pair("qwen3")
    prepare(fused, lora="fused", compile=ours)
    with torch.no_grad():
        logits(fused)  # takes the weights in
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


@pytest.mark.parametrize("kind", ["forward", "backward", "own forward"])
def test_what_hangs_on_one_projection_is_called(kind: str) -> None:
    fused, _ = pair("qwen3")
    called = []
    projection = fused.get_base_model().model.layers[0].self_attn.q_proj
    if kind == "forward":
        projection.register_forward_hook(lambda *_: called.append(1))
    elif kind == "backward":
        projection.register_full_backward_hook(lambda *_: called.append(1))
    else:
        plain = projection.forward
        projection.forward = lambda *args, **kwargs: called.append(1) or plain(*args, **kwargs)
    fused(**packed_call()).loss.backward()
    assert called == [1]


def test_the_trace_that_auto_reads_is_that_of_the_fused_layer() -> None:
    predicted = []
    for setting in ("fused", "stock"):
        choice = prepare(
            adapted(dtype=torch.bfloat16), lora=setting, compile=TRACED, checkpointing="auto"
        ).decide_checkpointing(96)
        assert choice is not None
        predicted.append(choice.predicted_bytes)
    assert predicted[0] != predicted[1]
