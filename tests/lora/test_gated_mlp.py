"""The gate of an MLP with adapters as one op: where a layer calls it, what is reported, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from deltatune import CompileOptions, prepare
from deltatune.hf.activations import activation_of
from deltatune.ops._lora_gated import api, providers
from lora_cases import adapted, assert_same, packed_call

TRACED = CompileOptions(backend="aot_eager")


@pytest.fixture
def kernels_may_run(monkeypatch) -> None:
    """Named kernels are taken; without a GPU their op adds the sums in plain torch."""
    monkeypatch.setattr(providers, "triton_refusal", lambda *_: None)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What computed the gates, by name."""
    found: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def run(*args: Any) -> torch.Tensor:
            found.append(name)
            result: torch.Tensor = function(*args)
            return result

        return run

    monkeypatch.setattr(api.reference, "lora_gated", noted("reference", api.reference.lora_gated))
    monkeypatch.setattr(api.sums, "lora_gated", noted("sums", api.sums.lora_gated))
    return found


def rows(prepared: Any) -> list[tuple[str, str]]:
    return [(row.impl, row.reason) for row in prepared.report.kernels if row.op == "lora_gated"]


@pytest.mark.parametrize(("family", "act"), [("qwen3", "gelu_pytorch_tanh"), ("qwen3_5", "silu")])
def test_auto_takes_products_that_add_to_their_adapters(family, act, calls) -> None:
    stock = adapted(family)
    for layer in stock.get_base_model().model.layers:
        layer.mlp.act_fn = ACT2FN[act]
    fused = copy.deepcopy(stock)
    prepared = prepare(fused, lora="fused")
    prepare(stock, lora="stock")
    assert_same(fused, stock)
    assert set(calls) == {"reference"}
    ((impl, reason),) = rows(prepared)
    assert impl == "reference"
    assert reason.startswith("products that add to their adapters'")


@pytest.mark.usefixtures("kernels_may_run")
@pytest.mark.parametrize(
    ("act", "checkpointing", "compiled"),
    [("silu", "none", False), ("gelu_pytorch_tanh", "layer", False), ("silu", "layer", True)],
)
def test_a_named_kernel_is_at_most_twice_as_far_from_float64_as_peft(act, checkpointing, compiled) -> None:
    stock = adapted("qwen3", dtype=torch.bfloat16, autocast_adapter_dtype=False)
    for layer in stock.get_base_model().model.layers:
        layer.mlp.act_fn = ACT2FN[act]
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    options = TRACED if compiled else None
    kernels = {"lora_gated": "triton"}
    prepared = prepare(fused, lora="fused", kernels=kernels, compile=options, checkpointing=checkpointing)
    for model in (stock, exact):
        prepare(model, lora="stock")
    for model in (stock, exact):
        model(**packed_call()).loss.backward()
    with torch.profiler.profile() as profile:
        fused(**packed_call()).loss.backward()
    run = " ".join(event.key for event in profile.key_averages())
    assert "deltatune::lora_gated_activation_backward" in run
    assert rows(prepared) == [("triton", "named by the caller")]

    def error(model: Any) -> float:
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        found = [(a.grad.double() - b.grad, b.grad) for a, b in pairs if b.grad is not None]
        return sum(float(d.norm() / e.norm()) for d, e in found) / len(found)

    assert error(fused) <= 2 * error(stock)


def _bias(mlp: Any) -> None:
    base = mlp.up_proj.base_layer
    base.bias = nn.Parameter(torch.ones(base.out_features), requires_grad=False)


def _hook(mlp: Any) -> None:
    mlp.gate_proj.register_forward_pre_hook(lambda *_: None)


def _hook_on_activation(mlp: Any) -> None:
    mlp.act_fn.register_forward_hook(lambda _module, _args, output: output * 2)


def _other_activation(mlp: Any) -> None:
    mlp.act_fn = nn.ReLU()


@pytest.mark.parametrize("change", [_bias, _hook, _hook_on_activation, _other_activation])
def test_what_else_a_layer_does_keeps_its_calls(change, calls) -> None:
    stock = adapted("qwen3")
    for layer in stock.get_base_model().model.layers:
        layer.mlp.act_fn = ACT2FN["silu"]  # of transformers one module may serve all layers
    fused = copy.deepcopy(stock)
    prepared = prepare(fused, lora="fused")
    for model in (stock, fused):
        for layer in model.get_base_model().model.layers:
            change(layer.mlp)
    prepare(stock, lora="stock")
    assert_same(fused, stock)
    assert calls == []
    assert rows(prepared) == []


def test_one_adapted_projection_alone_is_no_gate(calls) -> None:
    stock = adapted("qwen3", target_modules=["gate_proj", "down_proj"])
    fused = copy.deepcopy(stock)
    prepared = prepare(fused, lora="fused")
    prepare(stock, lora="stock")
    assert_same(fused, stock)
    assert calls == []
    assert rows(prepared) == []


def test_layers_that_are_not_fused_have_no_gate(calls) -> None:
    prepared = prepare(adapted("qwen3"))
    prepared.model(**packed_call())
    assert calls == []
    assert rows(prepared) == []


@pytest.mark.usefixtures("kernels_may_run")
def test_adapters_of_a_layer_count_together() -> None:
    model = adapted("qwen3", dtype=torch.bfloat16, r=33)
    model.add_adapter("second", peft.LoraConfig(r=32, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    prepare(model, lora="fused", kernels={"lora_gated": "triton"})
    with pytest.raises(ValueError, match="up to 64 columns of a layer's adapters, got 65"):
        model(**packed_call())


def test_a_kernel_that_cannot_run_is_refused_before_anything_changes() -> None:
    model = adapted("qwen3", dtype=torch.bfloat16)
    before = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match="lora_gated: impl='triton' cannot run here: triton needs an NVIDIA GPU"):
        prepare(model, kernels={"lora_gated": "triton"})
    assert {type(module) for module in model.modules()} == before


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.SiLU(), "silu"),
        (ACT2FN["silu"], "silu"),
        (ACT2FN["swish"], "silu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["gelu_python_tanh"], None),
        (nn.GELU(), None),
        (nn.functional.gelu, None),
        (ACT2FN["gelu"], None),
        (nn.ReLU(), None),
        (None, None),
    ],
)
def test_activations_are_known_by_their_classes(function, name) -> None:
    assert activation_of(function) == name


def test_a_subclass_of_an_activation_is_another() -> None:
    class Twice(ACT2CLS["silu"]):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert activation_of(Twice()) is None
