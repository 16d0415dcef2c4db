"""Copies of swapped modules: a part shares the state of its model, a whole model has its own."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from deltatune import prepare
from deltatune.hf.peft import readable, trained_copy
from deltatune.subclass import Swapped
from packed_cases import packed_call
from tiny import tiny_model


@pytest.mark.parametrize("saved", ["self_attn", "linear_attn", "norm", "mlp"])
def test_what_peft_copies_after_prepare_runs_as_the_original_would(saved: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["o_proj", "out_proj"], modules_to_save=[saved])
    model = tiny_model("qwen3_5").eval()
    prepare(model)
    expected = model(**packed_call()).logits
    adapted = peft.get_peft_model(model, config).eval()
    state = model._deltatune
    copies = [m for n, m in adapted.named_modules() if ".modules_to_save." in f"{n}." and isinstance(m, Swapped)]
    assert all(module._deltatune is state for module in copies)
    assert torch.equal(adapted(**packed_call()).logits, expected)
    generated = adapted.generate(packed_call()["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    prepare(adapted).revert()
    stock = adapted.generate(packed_call()["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, stock)


def test_a_copy_of_the_model_has_a_state_of_its_own_and_one_of_a_part_does_not() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    state = model._deltatune
    for part in (model.model.layers[0], model.model.layers, model.model.norm, model.model.layers[1].self_attn):
        copied = [m for m in copy.deepcopy(part).modules() if isinstance(m, Swapped)]
        assert copied
        assert all(module._deltatune is state for module in copied)
    for whole in (model, model.model, torch.nn.ModuleList([model])):
        copied = [m for m in copy.deepcopy(whole).modules() if isinstance(m, Swapped)]
        assert len({id(module._deltatune) for module in copied}) == 1
        assert all(module._deltatune is not state for module in copied)
    assert all(m._deltatune is state for m in model.modules() if isinstance(m, Swapped))


def test_a_copy_of_an_adapted_model_is_prepared_on_its_own() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    copied = copy.deepcopy(adapted)
    states = {id(m._deltatune) for m in copied.modules() if isinstance(m, Swapped)}
    assert len(states) == 1
    assert states != {id(model._deltatune)}
    prepare(copied).revert()
    assert isinstance(model, Swapped)
    assert not any(isinstance(m, Swapped) for m in copied.modules())


def norm_and_owner(*, saved: bool = False) -> tuple[torch.nn.Module, type[torch.nn.Module]]:
    """The query norm of a stock attention layer, and the class that calls it."""
    model = tiny_model("qwen3_5")
    attention = next(layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn"))
    if saved:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["q_norm"]))
    return attention.q_norm, type(attention)


@pytest.mark.parametrize("saved", [False, True])
def test_a_stock_norm_is_read_through_what_peft_put_around_it(saved: bool) -> None:
    norm, owner = norm_and_owner(saved=saved)
    inner = trained_copy(norm)
    assert (inner is not norm) == saved
    assert readable(norm, owner) is inner
    handle = norm.register_forward_hook(lambda *_: None)
    assert readable(norm, owner) is None
    handle.remove()
    assert readable(norm, owner) is inner
    inner.register_forward_hook(lambda *_: None)
    assert readable(norm, owner) is None


def test_a_norm_with_another_tools_forward_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, owner = norm_and_owner()
    with monkeypatch.context() as patched:
        patched.setattr(type(norm), "forward", lambda self, x: x)
        assert readable(norm, owner) is None
    assert readable(norm, owner) is norm
    norm.__class__ = type("Other", (type(norm),), {"__module__": __name__})
    assert readable(norm, owner) is None
    assert readable(norm_and_owner()[0], torch.nn.Linear) is None
