"""What changes between a forward and its backward: gradients are those of PEFT's layers, or torch refuses both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import nn

from deltatune import CompileOptions, prepare
from lora_cases import FEW, adapted, logits, packed_call, relative
from tiny import tiny_model

TRACED = CompileOptions(backend="aot_eager")


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def written(what: str) -> Callable[[Any], None]:
    """An in-place change of everything whose name holds this."""

    def change(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if what in name:
                    parameter.mul_(1.5)

    return change


def replaced(model: Any) -> None:
    for layer in lora_layers(model):
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def scaled(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in lora_layers(model):
            layer.set_scale("default", factor)

    return change


def without_scale_for_a_while(model: Any) -> None:
    before = [layer.scaling["default"] for layer in lora_layers(model)]
    scaled(0.0)(model)
    with torch.no_grad():
        logits(model)
    for layer, scale in zip(lora_layers(model), before, strict=True):
        layer.scaling["default"] = scale


def merged(model: Any) -> None:
    model.merge_adapter()


def merged_and_back(model: Any) -> None:
    model.merge_adapter()
    with torch.no_grad():
        logits(model)
    model.unmerge_adapter()


def disabled(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        logits(model)


def another_adapter(model: Any) -> None:
    names = model.peft_config["default"].target_modules
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model.set_adapter("other")
    with torch.no_grad():
        logits(model)


def deleted(model: Any) -> None:
    another_adapter(model)
    model.delete_adapter("default")


def loaded(model: Any, *, assign: bool) -> None:
    state = {name: value.clone() * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


CHANGES: dict[str, Callable[[Any], None]] = {
    "A written": written("lora_A"),
    "B written": written("lora_B"),
    "bases written": written("base_layer"),
    "replaced": replaced,
    "scale doubled": scaled(2.0),
    "scale zero for a while": without_scale_for_a_while,
    "merged": merged,
    "merged and back": merged_and_back,
    "disabled for a while": disabled,
    "another adapter": another_adapter,
    "deleted": deleted,
    "loaded": lambda m: loaded(m, assign=False),
    "loaded by assignment": lambda m: loaded(m, assign=True),
}
REFUSED_BY_PEFT = {"A written", "B written", "bases written", "loaded"}
#: Written behind autograd's back: PEFT's gradients are those of other weights, or of rounded ones.
REFUSED_HERE = {"merged", "merged and back"}


def gradients(model: Any, change: Callable[[Any], None]) -> list[torch.Tensor] | str:
    """Of the parameters that forward used, for a change before backward; or what torch says."""
    torch.manual_seed(0)
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**packed_call()).loss
    change(model)
    for parameter in used:  # PEFT freezes an adapter that is no longer active
        parameter.requires_grad_()
    try:
        return list(torch.autograd.grad(loss, used))
    except RuntimeError as error:
        return str(error)


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """The model has its weights, scales and one adapter again, whatever changes inside, and the graphs it has by then.

    Not for a change that deletes the adapter.
    """
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales = [dict(layer.scaling) for layer in lora_layers(model)]
    try:
        yield
    finally:
        if any(layer.merged_adapters for layer in lora_layers(model)):
            model.unmerge_adapter()
        model.set_adapter("default")
        if "other" in model.peft_config:
            model.delete_adapter("other")
        for layer, scale in zip(lora_layers(model), scales, strict=True):
            layer.scaling.update(scale)
        assert values.keys() == dict(model.named_parameters()).keys()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
                parameter.grad = None


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A model whose graphs every change meets that leaves them of use."""
    model = adapted("qwen3", target_modules=FEW)
    prepare(model, lora="fused", compile=TRACED)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_are_those_of_what_forward_used(change: str) -> None:
    stock = adapted("qwen3", target_modules="all-linear")
    fused = copy.deepcopy(stock)
    prepare(fused, lora="fused")
    assert_those_of_what_forward_used(fused, stock, change, eager=True)


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_of_graphs_are_those_of_what_forward_used(change: str, compiled: Any) -> None:
    stock = adapted("qwen3", target_modules=FEW)
    if change == "deleted":
        fused = copy.deepcopy(stock)
        prepare(fused, lora="fused", compile=TRACED)
        assert_those_of_what_forward_used(fused, stock, change, eager=False)
        return
    with as_it_was(compiled):
        assert_those_of_what_forward_used(compiled, stock, change, eager=False)


def assert_those_of_what_forward_used(fused: Any, stock: Any, change: str, *, eager: bool) -> None:
    untouched = copy.deepcopy(stock)
    for model in (stock, untouched):
        prepare(model, lora="stock")
    theirs = gradients(stock, CHANGES[change])
    assert isinstance(theirs, str) == (change in REFUSED_BY_PEFT)
    ours = gradients(fused, CHANGES[change])
    if isinstance(ours, str):
        assert change in REFUSED_BY_PEFT | REFUSED_HERE, ours
        assert "modified by an inplace operation" in ours
        return
    assert change not in REFUSED_HERE
    assert not (eager and isinstance(theirs, str))
    expected = gradients(untouched, lambda _: None) if isinstance(theirs, str) else theirs
    for found, want in zip(ours, expected, strict=True):
        assert relative(found, want) < 1e-5  # type: ignore[arg-type]


def written_anew(what: str) -> Callable[[Any], None]:
    """Other storage for everything whose name holds this, which autograd does not see."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if what in name:
                parameter.data = parameter.data * 1.5

    return change


def test_what_merged_weights_computed_is_refused_when_they_are_no_longer_merged() -> None:
    model = adapted("qwen3", target_modules=FEW)
    prepare(model, lora="fused")
    model.get_input_embeddings().requires_grad_()
    model.merge_adapter()
    assert isinstance(gradients(model, lambda m: m.unmerge_adapter()), str)


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "base_layer"])
def test_an_eager_backward_reads_the_storage_that_forward_read(what: str) -> None:
    model = adapted("qwen3", target_modules="all-linear")
    untouched = copy.deepcopy(model)
    prepare(model, lora="fused")
    prepare(untouched, lora="stock")
    ours, expected = gradients(model, written_anew(what)), gradients(untouched, lambda _: None)
    for found, want in zip(ours, expected, strict=True):
        assert relative(found, want) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [None, TRACED], ids=["eager", "compiled"])
def test_two_layers_of_one_base_weight(options: CompileOptions | None) -> None:
    model = tiny_model("qwen3")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "gate_proj"], init_lora_weights=False)
    fused = peft.get_peft_model(model, config).train()
    stock = copy.deepcopy(fused)
    prepare(fused, lora="fused", compile=options)
    prepare(stock, lora="stock")
    weight = first.up_proj.base_layer.weight
    for step in range(2):
        for each in (fused, stock):
            each.zero_grad()
            each(**packed_call(step)).loss.backward()
        pairs = [(a.grad, b.grad) for a, b in zip(fused.parameters(), stock.parameters(), strict=True)]
        assert max(relative(a, b) for a, b in pairs if b is not None) < 1e-5
    assert first.up_proj.base_layer.weight is weight is second.up_proj.base_layer.weight


@pytest.mark.parametrize("options", [None, TRACED], ids=["eager", "compiled"])
def test_two_models_over_one_base(options: CompileOptions | None) -> None:
    base = tiny_model("qwen3")

    def over(seed: int) -> Any:
        shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(base, shared), config).train()

    models = [over(seed) for seed in range(2)]
    stocks = [over(seed) for seed in range(2)]
    prepared = [prepare(model, lora="fused", compile=options) for model in models]
    for model in stocks:
        prepare(model, lora="stock")
    for _ in range(2):
        for found in (models, stocks):
            waiting = found[0](**packed_call()).loss
            found[1](**packed_call(1)).loss.backward()
            waiting.backward()
    for fused, stock in zip(models, stocks, strict=True):
        for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
            if theirs.grad is not None:
                assert relative(ours.grad, theirs.grad) < 1e-5
    for one in prepared:
        assert one.compile_report is None or one.compile_report.recompiles == []


@pytest.mark.parametrize("options", [None, TRACED], ids=["eager", "compiled"])
def test_modes_of_gradients_in_any_order(options: CompileOptions | None) -> None:
    fused = adapted("qwen3", target_modules=FEW)
    stock = copy.deepcopy(fused)
    prepare(fused, lora="fused", compile=options)
    prepare(stock, lora="stock")
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad, torch.enable_grad):
        with mode():
            found, want = logits(fused), logits(stock)
        assert relative(found, want) < 1e-5
        assert found.requires_grad == want.requires_grad
    for model in (fused, stock):
        model(**packed_call()).loss.backward()
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(ours.grad, theirs.grad) < 1e-5
