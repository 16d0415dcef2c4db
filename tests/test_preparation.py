"""prepare and its way back: modules, adapters, copies, saved weights, the report, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from deltatune import prepare
from packed_cases import packed_call
from tiny import FAMILIES, HYBRIDS, documents, tiny_model

TARGETS = ["q_proj", "v_proj", "out_proj", "in_proj_qkv", "in_proj_qkvz"]


def lora(model: Any, **changes: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **changes)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_revert_leaves_nothing_behind(family: str) -> None:
    model = tiny_model(family)
    (tokens,) = documents([40])
    before = model(tokens[None]).logits
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config)
    attention, masks = dict(AttentionInterface()), dict(AttentionMaskInterface())
    prepared = prepare(model)
    model(**packed_call(), labels=packed_call()["input_ids"]).loss.backward()
    prepared.revert()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation
    assert {name: AttentionInterface()[name] for name in attention} == attention
    assert {name: AttentionMaskInterface()[name] for name in masks} == masks
    assert torch.equal(model(tokens[None]).logits, before)


def test_revert_keeps_adapters_added_in_between() -> None:
    model = tiny_model("qwen3_5")
    stock = copy.deepcopy(model)
    prepared = prepare(model)
    adapted = lora(model)
    expected = lora(stock)
    expected.load_state_dict(adapted.state_dict())
    prepared.revert()
    (tokens,) = documents([40])
    assert torch.equal(adapted(tokens[None]).logits, expected(tokens[None]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_before_and_after_prepare_agree(family: str) -> None:
    before, after = lora(tiny_model(family)), tiny_model(family)
    prepare(before)
    prepare(after)
    after = lora(after)
    after.load_state_dict(before.state_dict())
    labels = packed_call()["input_ids"]
    losses = []
    for model in (before, after):
        loss = model(**packed_call(labels=labels)).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None, name
            assert torch.equal(a.grad, b.grad), name
            assert "lora_B" in name or bool(a.grad.abs().sum() > 0), name


def test_modules_to_save_train_their_copy() -> None:
    model = lora(tiny_model("qwen3_5"), modules_to_save=["lm_head", "q_norm", "conv1d"])
    prepare(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(names) == 3
    model(**packed_call(labels=packed_call()["input_ids"])).loss.backward()
    for name in names:
        assert model.get_parameter(name).grad.abs().sum() > 0, name
    reference = lora(tiny_model("qwen3_5"), modules_to_save=["lm_head", "q_norm", "conv1d"])
    reference.load_state_dict(model.state_dict())
    (doc,) = documents([40])
    torch.testing.assert_close(model(doc[None]).logits, reference(doc[None]).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head_counts_in_the_loss() -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    stock = peft.get_peft_model(tiny_model("qwen3_5"), config)
    model = copy.deepcopy(stock)
    prepare(model)
    (doc,) = documents([40])
    torch.testing.assert_close(
        model(doc[None], labels=doc[None]).loss, stock(doc[None], labels=doc[None]).loss, rtol=1e-6, atol=0
    )


def test_prepare_twice_and_two_models() -> None:
    first, second = tiny_model("qwen3_5"), tiny_model("qwen3_5", seed=1)
    expected = {seed: tiny_model("qwen3_5", seed=seed) for seed in (0, 1)}
    prepare(first)
    prepare(second)
    prepare(first)
    for seed, model in enumerate((first, second)):
        prepare(expected[seed])
        assert torch.equal(model(**packed_call()).logits, expected[seed](**packed_call()).logits)


def test_deepcopy_and_pickle() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    expected = model(**packed_call()).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**packed_call()).logits, expected)
        prepare(copied).revert()
        assert type(copied) is transformers.Qwen3_5ForCausalLM
    assert torch.equal(model(**packed_call()).logits, expected)


@pytest.mark.parametrize("bare", [False, True])
def test_the_class_of_a_prepared_model_makes_stock_models(bare: bool, tmp_path: Path) -> None:
    stock = tiny_model("qwen3_5")
    stock = stock.model if bare else stock
    model = copy.deepcopy(stock)
    prepare(model)
    model.save_pretrained(tmp_path)
    (tokens,) = documents([9])
    for made in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert [type(module) for module in made.modules()] == [type(module) for module in stock.modules()]
        made.load_state_dict(stock.state_dict())
        assert torch.equal(made(tokens[None])[0], stock(tokens[None])[0])
        prepare(made)
        assert torch.equal(made(**packed_call())[0], model(**packed_call())[0])


def test_a_blank_copy_is_of_our_class() -> None:
    """As DataParallel and accelerate make one: by the class's ``__new__`` without arguments."""
    model = tiny_model("qwen3")
    prepare(model)
    assert type(model._replicate_for_data_parallel()) is type(model)


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_checkpointing_changes_no_gradient(checkpointing: str) -> None:
    reference, model = tiny_model("qwen3_5"), tiny_model("qwen3_5").train()
    prepare(reference)
    prepare(model, checkpointing=checkpointing)
    labels = packed_call()["input_ids"]
    for m in (reference, model):
        m(**packed_call(labels=labels)).loss.backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: tiny_model("qwen3_5", attention_dropout=0.1), {}, "attention_dropout"),
        (lambda: tiny_model("qwen3_5", hidden_act="gelu"), {}, "'silu'"),
        (lambda: torch.nn.Linear(2, 2), {}, "transformers or PEFT model"),
        (lambda: tiny_model("qwen3_5"), {"checkpointing": 0.5}, "needs compile"),
        (lambda: tiny_model("qwen3_5"), {"checkpointing": "some"}, "'none', 'layer'"),
        (lambda: tiny_model("qwen3_5"), {"kernels": {"gated_delta_rule": "magic"}}, "unknown impl='magic'"),
        (lambda: tiny_model("qwen3"), {"kernels": {"gated_delta_rule": "reference"}}, "not an op of qwen3"),
        (lambda: tiny_model("qwen3_5"), {"lora": "fused"}, "needs LoRA layers"),
    ],
)
def test_what_cannot_be_prepared_is_refused(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(build(), **arguments)


def test_checkpointing_twice_is_refused() -> None:
    model = tiny_model("qwen3_5")
    model.gradient_checkpointing_enable()
    prepare(model)  # the stock way alone is fine
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        prepare(model, checkpointing="layer")
    model.gradient_checkpointing_disable()
    prepare(model, checkpointing="layer")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing=False in a trainer's"):
        model.train()(**packed_call())


def test_a_forward_that_was_replaced_before_is_warned_of() -> None:
    model = tiny_model("qwen3_5")
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.warns(UserWarning, match="replaced on this model before prepare"):
        prepare(model)


def test_an_unknown_recurrent_model_is_refused_by_name() -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match="Mamba"):
        prepare(transformers.MambaForCausalLM(config))


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_the_report_counts_swaps(hybrid: str) -> None:
    report = prepare(tiny_model(hybrid, layers=4)).report
    rows = {row.layer: (row.expected, row.found) for row in report.swaps}
    assert rows["GatedAttention"] == (2, 2)
    assert rows["DecoderLayer"] == (4, 4)
    text = str(report)
    assert "gated_delta_rule" in text
    assert "reference" in text
    assert report.to_dict()["trainable_parameters"] == report.total_parameters


def test_the_report_says_what_of_the_routed_experts_trains() -> None:
    assert prepare(tiny_model("qwen3")).report.experts is None
    model = tiny_model("gpt_oss")
    size = sum(p.numel() for name, p in model.named_parameters() if "experts." in name)
    assert f"2 a token; {size:,} parameters" in str(prepare(model.requires_grad_(False)).report)
    linear = peft.LoraConfig(r=4, target_modules=["q_proj"])
    assert "no adapter on them" in str(prepare(peft.get_peft_model(model, linear)).report)
    model = tiny_model("gpt_oss")
    both = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    adapted = peft.get_peft_model(model, both)
    trained = sum(p.numel() for name, p in adapted.named_parameters() if "experts" in name and p.requires_grad)
    report = prepare(adapted).report
    assert report.experts is not None
    assert report.experts.endswith(f"{trained:,} trained for them")
    assert report.to_dict()["experts"] == report.experts


def test_saved_weights_and_architecture_are_stock(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5")
    keys = list(model.state_dict())
    prepare(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.Qwen3_5ForCausalLM
    (tokens,) = documents([40])
    torch.testing.assert_close(loaded(tokens[None]).logits, model(tokens[None]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", ["linear_attn", "self_attn"])
def test_a_swapped_module_may_be_saved_whole(module: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=[module])
    model = peft.get_peft_model(tiny_model("qwen3_5"), config)
    stock = copy.deepcopy(model)
    prepare(model)
    prepare(model)
    model(**packed_call(labels=packed_call()["input_ids"])).loss.backward()
    trained = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    assert trained
    assert all(p.grad is not None for p in trained)
    (doc,) = documents([20])
    torch.testing.assert_close(model(doc[None]).logits, stock(doc[None]).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_norm_is_refused_not_ignored() -> None:
    model = peft.get_peft_model(tiny_model("qwen3_5"), peft.LNTuningConfig(target_modules=["q_norm"]))
    prepare(model)
    with pytest.raises(ValueError, match="leave norms and convolutions out"):
        model(**packed_call())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": True}, r"got True; pass compile=CompileOptions\(\)"),
        ({"checkpointing": None}, "'none', 'layer', 'auto' or a number"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(tiny_model("qwen3"), **arguments)


@pytest.mark.parametrize("again", [False, True])
def test_a_layer_of_another_prepared_model_is_refused_and_nothing_changes(again: bool) -> None:
    owner, model = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    if again:
        prepare(model)
    model.model.layers[0] = owner.model.layers[0]
    prepare(owner)
    before = [(type(module), module.__dict__.get("_deltatune")) for module in (*model.modules(), *owner.modules())]
    with pytest.raises(ValueError, match=r"model\.layers\.0 .*belongs to another prepared model"):
        prepare(model)
    after = [(type(module), module.__dict__.get("_deltatune")) for module in (*model.modules(), *owner.modules())]
    assert after == before
