"""Fused adapters that end: switched off, merged, unloaded, saved, reverted; against PEFT's own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from deltatune import prepare
from lora_cases import adapted, assert_same, fused_layers, logits, packed_call, pair, relative
from tiny import documents, tiny_model


def base_weights(model: Any) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "base_layer.weight" in name]


def test_disabling_is_the_base_model() -> None:
    fused, _ = pair()
    base = tiny_model("qwen3_5")
    prepare(base)
    with fused.disable_adapter():
        assert relative(logits(fused), logits(base)) < 1e-6
    assert relative(logits(fused), logits(base)) > 1e-2
    with fused.disable_adapter():
        assert relative(logits(fused), logits(base)) < 1e-6
    assert fused_layers(fused) == 15


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_bit_equal_with_peft(dtype: torch.dtype, safe: bool) -> None:
    fused, stock = pair(dtype=dtype)
    logits(fused)
    for model in (fused, stock):
        model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(*both) for both in zip(base_weights(fused), base_weights(stock), strict=True))
    assert all(weight.is_contiguous() for weight in base_weights(fused))
    assert torch.equal(logits(fused), logits(stock))
    for model in (fused, stock):
        model.unmerge_adapter()
    assert all(torch.equal(*both) for both in zip(base_weights(fused), base_weights(stock), strict=True))
    exact = copy.deepcopy(stock).double()
    bound = max(2 * relative(logits(stock), logits(exact)), 1e-5)
    assert relative(logits(fused), logits(exact)) < bound
    assert fused_layers(fused) == 15
    for model in (fused, stock):
        merged = model.merge_and_unload(safe_merge=safe)
        with torch.no_grad():
            values = logits(merged)
    assert torch.equal(values, logits(fused.get_base_model()))
    ours, theirs = fused.get_base_model().state_dict(), stock.get_base_model().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].is_contiguous() for name in theirs)


def test_unloading_leaves_a_plain_model() -> None:
    fused, _ = pair()
    logits(fused)
    base = tiny_model("qwen3_5")
    prepare(base)
    unloaded = fused.unload()
    assert torch.equal(logits(unloaded), logits(base))
    assert all(parameter.is_contiguous() for parameter in unloaded.parameters())
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_deleting_an_adapter_leaves_the_other() -> None:
    fused, _ = pair()
    logits(fused)
    fused.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fused.set_adapter("other")
    fused.delete_adapter("default")
    stock = copy.deepcopy(fused)
    prepare(stock, lora="stock")
    assert relative(logits(fused), logits(stock)) < 1e-5
    assert fused_layers(fused) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapters_load_into_stock_peft_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    fused, stock = pair(dtype=dtype)
    logits(fused)
    for name, model in (("fused", fused), ("stock", stock)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "fused/adapter_model.safetensors").read_bytes() == (
        tmp_path / "stock/adapter_model.safetensors"
    ).read_bytes()
    loaded = peft.PeftModel.from_pretrained(tiny_model("qwen3_5", dtype=dtype), tmp_path / "fused")
    state = fused.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    (tokens,) = documents([20])
    prepare(fused, lora="stock")
    prepare(loaded, lora="stock")
    assert torch.equal(fused(tokens[None]).logits, loaded(tokens[None]).logits)


def test_saved_base_weights_are_those_of_the_stock_model(tmp_path: Path) -> None:
    fused, stock = pair()
    logits(fused)
    for name, model in (("fused", fused), ("stock", stock)):
        model.get_base_model().save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("fused", "stock"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stock.load_state_dict(torch.load(tmp_path / "fused.pt"), assign=True)
    assert relative(logits(fused), logits(stock)) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_revert_gives_plain_weights_back(family: str) -> None:
    names = ["q_proj", "o_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "out_proj"]
    fused = adapted(family, target_modules=names)
    stock = copy.deepcopy(fused)
    attributes = {name: set(module.__dict__) for name, module in fused.named_modules()}
    classes = {name: type(module) for name, module in fused.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in fused.named_modules()}
    prepared = prepare(fused, lora="fused")
    fused(**packed_call()).loss.backward()
    assert fused_layers(fused) > 0
    prepared.revert()
    assert {name: set(module.__dict__) for name, module in fused.named_modules()} == attributes
    assert {name: type(module) for name, module in fused.named_modules()} == classes
    assert {name: len(module._forward_pre_hooks) for name, module in fused.named_modules()} == hooks
    assert all(parameter.is_contiguous() for parameter in fused.parameters())
    (tokens,) = documents([20])
    assert torch.equal(fused(tokens[None], use_cache=False).logits, stock(tokens[None], use_cache=False).logits)


def test_preparing_again_starts_over() -> None:
    fused, stock = pair()
    logits(fused)
    prepare(fused, lora="stock")
    assert all(weight.is_contiguous() for weight in base_weights(fused))
    assert torch.equal(logits(fused), logits(stock))
    prepare(fused, lora="fused")
    assert_same(fused, stock)


def test_a_trainer_saves_and_resumes(tmp_path: Path) -> None:
    """transformers.Trainer's checkpoints of a fused model are those of PEFT's layers."""
    rows = [{"input_ids": t.tolist(), "labels": t.tolist()} for t in documents([16] * 4)]
    losses = {}
    for name, model in zip(("fused", "stock"), pair(), strict=True):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=3, save_steps=2, learning_rate=1e-2, report_to="none",
            per_device_train_batch_size=2, use_cpu=True, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        losses[name].append(trainer.state.log_history[-1].get("train_loss"))
    assert losses["fused"] == pytest.approx(losses["stock"], rel=1e-4)
