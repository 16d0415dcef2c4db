"""Adapters that do not compile as one graph are refused by a strict prepare, before anything is changed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from deltatune import CompileOptions, prepare
from lora_cases import packed_call
from tiny import tiny_model

TARGETS = ["q_proj", "in_proj_z"]
STRICT, LENIENT = CompileOptions(backend="aot_eager"), CompileOptions(backend="aot_eager", strict=False)
BREAK: dict[str, tuple[str, dict[str, Any]]] = {
    "loha.layer.Linear": ("LoHaConfig", {"target_modules": TARGETS}),
    "lokr.layer.Linear": ("LoKrConfig", {"target_modules": TARGETS}),
}
DORA = ("LoraConfig", {"target_modules": TARGETS, "use_dora": True})
COMPILE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": TARGETS, "lora_dropout": 0.1}),
    "lora of parameters": ("LoraConfig", {"target_parameters": ["mlp.gate_proj.weight", "in_proj_z.weight"]}),
    "ia3": ("IA3Config", {"target_modules": TARGETS, "feedforward_modules": []}),
    "adalora": ("AdaLoraConfig", {"target_modules": TARGETS, "init_r": 6, "target_r": 4, "total_step": 10}),
}


def with_adapters(config: str, values: dict[str, Any], family: str = "qwen3_5", device: str = "cpu") -> Any:
    """On one recurrent layer; with experts, on one of attention too."""
    model = tiny_model(family, layers=1 if family == "qwen3_5" else 2, use_cache=False).to(device)
    extra = {} if config == "IA3Config" or "init_r" in values else {"r": 4}
    return peft.get_peft_model(model, getattr(peft, config)(**values, **extra)).train()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", BREAK)
def test_kinds_that_break_are_refused_by_name(kind: str, device: str) -> None:
    model = with_adapters(*BREAK[kind], device=device)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"{kind}.*layers\.0.*plain LoRA.*strict=False"):
        prepare(model, compile=STRICT)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("kind", BREAK)
def test_they_train_where_breaks_are_counted(kind: str) -> None:
    model = with_adapters(*BREAK[kind])
    prepared = prepare(model, compile=LENIENT)
    model(**packed_call()).loss.backward()
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks


@pytest.mark.parametrize("kind", COMPILE)
def test_kinds_that_compile_are_not_refused(kind: str) -> None:
    model = with_adapters(*COMPILE[kind])
    prepared = prepare(model, compile=STRICT)
    model(**packed_call()).loss.backward()
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj", "mlp.gate.weight"])
def test_adapters_on_parameters_are_refused_where_they_stay_peft_s_own(name: str) -> None:
    model = with_adapters("LoraConfig", {"target_modules": ["q_proj"], "target_parameters": [name]}, "qwen3_5_moe")
    with pytest.raises(ValueError, match=rf"ParamWrapper .*{name.rpartition('.')[0]}.*replaces the parameter"):
        prepare(model, compile=STRICT, lora="stock")
    prepare(model, compile=STRICT)


def outcome(model: Any) -> str:
    try:
        prepare(model, compile=STRICT)
    except ValueError as error:
        return str(error)
    model(**packed_call()).loss.backward()
    return "compiled"


def test_dora_is_refused_by_name_or_compiles() -> None:
    """Torch 2.11 captures it, torch 2.13 does not."""
    found = outcome(with_adapters(*DORA))
    assert found == "compiled" or "DoraLinearVariant" in found


def test_eager_layers_take_any_adapter() -> None:
    model = with_adapters(*DORA)
    prepare(model)
    assert torch.isfinite(model(**packed_call()).loss)
