"""Routers of compiled layers: whose logits are recorded, under which graph, in which form they come back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from deltatune import CompileOptions, prepare
from deltatune.compile.graphs import FROZEN
from deltatune.layers.router import Router, recorded_routers, recording, run_recorded
from deltatune.subclass import swap
from packed_cases import packed_call
from tiny import tiny_model

TRACED = CompileOptions(backend="aot_eager")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (OutputRecorder(nn.Linear, index=0), 2),
        (OutputRecorder(nn.Linear, index=1), 0),  # its first output is something else
        ([OutputRecorder(nn.Linear, index=2), OutputRecorder(nn.Identity, index=0)], 1),
        (OutputRecorder(nn.Conv1d, index=0), 0),
        (nn.Linear, 0),
        (None, 0),
    ],
)
def test_routers_are_those_whose_first_output_is_recorded(recorded: Any, expected: int) -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Identity()), nn.Linear(2, 2)])
    model = SimpleNamespace(layers=layers, _can_record_outputs={"router_logits": recorded} if recorded else None)
    assert len(list(recorded_routers(model))) == expected


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_layers_without_gradients_keep_their_graphs_while_logits_are_recorded(checkpointing: Any) -> None:
    """A graph is told by its name: one that trains nothing is not checkpointed."""
    config = peft.LoraConfig(r=4, target_modules=["layers.1.self_attn.q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3_moe"), config).train()
    reference = copy.deepcopy(model)
    prepared = prepare(model, compile=TRACED, checkpointing=checkpointing)
    prepare(reference)
    call = packed_call(labels=packed_call()["input_ids"], output_router_logits=True)
    ours, theirs = (one(**call) for one in (model, reference))
    torch.testing.assert_close(ours.router_logits, theirs.router_logits, rtol=1e-4, atol=1e-5)
    assert [logits.requires_grad for logits in ours.router_logits] == [False, True]
    assert prepared.compile_report is not None
    name = "layer_Qwen3MoeSparseMoeBlock (router logits)"
    assert prepared.compile_report.graphs == {name + FROZEN: 1, name: 1}


@pytest.mark.parametrize("options", [None, TRACED], ids=["eager", "compiled"])
@pytest.mark.parametrize("given", ["argument", "config"])
def test_recorded_logits_in_a_tuple(options: CompileOptions | None, given: str) -> None:
    model = tiny_model("qwen3_moe", layers=2 if options is None else 1).model
    reference = copy.deepcopy(model)
    prepare(model, compile=options)
    prepare(reference)
    call = packed_call(output_router_logits=True)
    if given == "argument":
        call["return_dict"] = False
    else:
        model.config.return_dict = False
    output = model(**call)
    assert type(output) is tuple
    hidden, logits = output
    expected = reference(**packed_call(output_router_logits=True))
    torch.testing.assert_close(hidden, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected.router_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_logits_are_the_first_output_or_the_only_one(as_tuple: bool) -> None:
    class Gate(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return (logits, logits.argmax(-1)) if as_tuple else logits

    layer, x = nn.Sequential(Gate(4, 3)), torch.randn(5, 4)
    expected = nn.functional.linear(x, layer[0].weight, layer[0].bias)
    prepare(model := tiny_model("qwen3"))
    swap(layer[0], Router, model._deltatune)

    def run(_label: str, forward: Any, module: nn.Module, *args: Any) -> Any:
        return forward(module, *args)

    with recording() as found:
        run_recorded(run, "layer", nn.Sequential.forward, layer, x)
    assert len(found) == 1
    assert torch.equal(found[0], expected)
