"""What may happen to a model that trains with fused adapters, against PEFT's own layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from deltatune import prepare
from lora_cases import adapted, assert_gradients_close, assert_same, fused_layers, logits, packed_call, pair, relative
from tiny import documents


def test_structure_and_weights_are_those_of_peft() -> None:
    fused, stock = pair()
    expected, structure = stock.state_dict(), {name: type(m) for name, m in stock.named_modules()}
    logits(fused)
    assert fused_layers(fused) == 15
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in fused.named_buffers()] == [name for name, _ in stock.named_buffers()]
    assert list(structure) == [name for name, _ in fused.named_modules()]
    assert all(p.is_contiguous() and type(p) is nn.Parameter for p in fused.parameters())
    found = fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu"),
        lambda m: m.apply(lambda module: None),
        lambda m: m.requires_grad_(False),
    ],
    ids=["to_dtype", "double", "bfloat16", "to_device", "apply", "freeze"],
)
def test_moved_and_cast_models_go_on(move: Callable[[Any], Any]) -> None:
    fused, stock = pair()
    before = logits(fused)
    fused, stock = move(fused), move(stock)
    after, theirs = logits(fused), logits(stock)
    assert after.dtype == theirs.dtype
    assert relative(after, before) <= max(1e-5, 2 * relative(theirs, before))
    assert fused_layers(fused) == 15


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("ran", [False, True])
def test_copies_are_independent(duplicate: Callable[[Any], Any], ran: bool) -> None:
    fused, stock = pair()
    expected = logits(fused) if ran else None
    twin = duplicate(fused)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name or "base_layer" in name:
                parameter.mul_(2)
    if expected is not None:
        assert torch.equal(logits(fused), expected)
    assert_same(fused, stock)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name or "base_layer" in name:
                parameter.mul_(2)
    assert_same(twin, stock)
    assert fused_layers(twin) == 15
    assert {p.untyped_storage().data_ptr() for p in twin.parameters()}.isdisjoint(
        {p.untyped_storage().data_ptr() for p in fused.parameters()}
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "loop": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_of_every_optimizer_are_seen(optimizer: str) -> None:
    fused, stock = pair()
    losses = []
    for model in (fused, stock):
        steps = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        found = []
        for step in range(4):
            steps.zero_grad()
            loss = model(**packed_call(step)).loss
            loss.backward()
            steps.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    assert losses[1].diff().abs().min() > 1e-3
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def _raw(model: Any) -> None:
    """As kernels that know nothing of autograd write."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.numpy()[...] *= 1.5


def _new_parameters(model: Any) -> None:
    for name, module in model.named_modules():
        if "lora_" in name and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() * 1.5)


def _load(model: Any, *, assign: bool) -> None:
    state = {name: value.clone() * (1.5 if "lora_" in name else 1.25) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _load_adapter(model: Any) -> None:
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {name: value * 1.5 for name, value in state.items()})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "raw": _raw,
    "new_parameters": _new_parameters,
    "load": lambda m: _load(m, assign=False),
    "load_assign": lambda m: _load(m, assign=True),
    "load_adapter": _load_adapter,
    "scale": lambda m: [x.scale_layer(3.0) for x in m.modules() if hasattr(x, "scale_layer")],
    "set_scale": lambda m: [x.set_scale("default", 0.25) for x in m.modules() if hasattr(x, "set_scale")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_from_outside_are_seen(change: str) -> None:
    fused, stock = pair(dtype=torch.float64)
    before = logits(fused)
    for model in (fused, stock):
        CHANGES[change](model)
    assert relative(logits(fused), before) > 1e-3
    assert_same(fused, stock)
    assert fused_layers(fused) == 15


def test_gradients_accumulate() -> None:
    fused, stock = pair()
    for model in (fused, stock):
        for seed in range(3):
            model(**packed_call(seed)).loss.backward()
    assert_gradients_close(fused, stock)


def _plain(model: Any) -> torch.Tensor:
    return model(**packed_call(1)).loss


def _without_adapter(model: Any) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(**packed_call(1)).loss


def _reference_adapter(model: Any) -> torch.Tensor:
    model.set_adapter("reference")
    with torch.no_grad():
        loss = model(**packed_call(1)).loss
    model.set_adapter("default")
    return loss


def _other_adapter(model: Any) -> torch.Tensor:
    model.set_adapter("reference")
    loss = model(**packed_call(1)).loss
    model.set_adapter("default")
    return loss


@pytest.mark.parametrize("second", [_plain, _without_adapter, _reference_adapter, _other_adapter])
def test_two_forwards_before_one_backward(second: Callable[[Any], torch.Tensor]) -> None:
    """Preference training compares a policy with itself on other tokens, or with a reference."""
    fused, stock = adapted(), None
    fused.add_adapter("reference", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    fused.set_adapter("default")
    stock = copy.deepcopy(fused)
    prepare(fused, lora="fused")
    prepare(stock, lora="stock")
    values = []
    for model in (fused, stock):
        for _ in range(2):
            loss = model(**packed_call(0)).loss * 2 - second(model)
            loss.backward()
        values.append(loss.detach())
        for name, parameter in model.named_parameters():  # PEFT freezes an adapter that is not active
            parameter.requires_grad_("lora_" in name)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    assert_gradients_close(fused, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_first_and_training_afterwards(mode: Any) -> None:
    fused, stock = pair()
    with mode():
        assert relative(logits(fused.eval()), logits(stock.eval())) < 1e-5
    assert fused_layers(fused) == 15
    fused.train()
    stock.train()
    assert_same(fused, stock)
    with mode():
        assert relative(logits(fused), logits(stock)) < 1e-5
    assert_same(fused, stock)


@pytest.mark.parametrize("reentrant", [False, True])
def test_stock_gradient_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    fused, stock = pair()
    for model in (fused, stock):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**packed_call()).loss.backward()
    assert_gradients_close(fused, stock)


def test_functional_calls_see_the_adapters_they_are_given() -> None:
    fused, stock = pair()
    given = {name: p.detach() * 1.5 for name, p in fused.named_parameters() if "lora_" in name}
    found, expected = (torch.func.functional_call(model, given, (), packed_call()).loss for model in (fused, stock))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert_same(fused, stock)


def test_generation_takes_the_stock_path() -> None:
    fused, stock = pair()
    logits(fused)
    tokens = torch.stack(documents([12, 12]))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = fused.eval().generate(tokens, **settings), stock.eval().generate(tokens, **settings)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
