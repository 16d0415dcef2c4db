"""What may happen to a model whose frozen weights lie in bordered buffers, against PEFT's own layers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from deltatune import prepare
from lora_cases import (
    adapted,
    assert_gradients_close,
    assert_same,
    bordered,
    groups,
    logits,
    packed_call,
    pair,
    relative,
)
from tiny import documents, tiny_model


def base_weights(model: Any) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "base_layer.weight" in name]


def test_the_border_is_no_part_of_the_model() -> None:
    fused, stock = pair()
    expected, structure = stock.state_dict(), {name: type(m) for name, m in stock.named_modules()}
    logits(fused)
    assert bordered(fused) == 15
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in fused.named_buffers()] == [name for name, _ in stock.named_buffers()]
    assert list(structure) == [name for name, _ in fused.named_modules()]
    found = fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_need_no_columns_stay_contiguous() -> None:
    """Only a border of columns moves rows apart; the weights of narrowing layers keep their layout."""
    fused, _ = pair("qwen3")
    logits(fused)
    layout = {name: m.weight.is_contiguous() for name, m in fused.named_modules() if name.endswith("base_layer")}
    plain = {name.split(".")[-2] for name, contiguous in layout.items() if contiguous}
    assert plain >= {"o_proj", "down_proj"}
    assert plain.isdisjoint({"gate_proj", "up_proj", "q_proj"})


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
    assert bordered(fused) == 15


def test_a_cast_frees_the_old_buffers() -> None:
    fused, _ = pair()
    logits(fused)
    buffers = [weakref.ref(buffer) for group in groups(fused) for buffer in group.operands.bordered]
    fused.double()
    gc.collect()
    assert all(buffer() is None for buffer in buffers)


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
    assert bordered(twin) == 15
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
    assert bordered(fused) == 15


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


def test_a_step_between_forward_and_backward_is_refused_as_torch_does() -> None:
    fused, stock = pair()
    for model in (fused, stock):
        waiting = model(**packed_call()).loss
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.1)
        model(**packed_call(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            waiting.backward()


def test_disabling_is_the_base_model() -> None:
    fused, _ = pair()
    base = tiny_model("qwen3_5")
    prepare(base)
    with fused.disable_adapter():
        assert relative(logits(fused), logits(base)) < 1e-6
    assert relative(logits(fused), logits(base)) > 1e-2
    with fused.disable_adapter():
        assert relative(logits(fused), logits(base)) < 1e-6
    assert bordered(fused) == 15


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
    assert relative(logits(fused), logits(stock)) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert bordered(fused) == 15
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


def test_deleting_an_adapter_gives_the_weights_back() -> None:
    fused, _ = pair()
    logits(fused)
    fused.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fused.set_adapter("other")
    fused.delete_adapter("default")
    stock = copy.deepcopy(fused)
    prepare(stock, lora="stock")
    assert relative(logits(fused), logits(stock)) < 1e-5
    assert bordered(fused) == 1


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
    assert bordered(fused) > 0
    prepared.revert()
    assert {name: set(module.__dict__) for name, module in fused.named_modules()} == attributes
    assert {name: type(module) for name, module in fused.named_modules()} == classes
    assert {name: len(module._forward_pre_hooks) for name, module in fused.named_modules()} == hooks
    assert all(parameter.is_contiguous() for parameter in fused.parameters())
    (tokens,) = documents([20])
    assert torch.equal(fused(tokens[None], use_cache=False).logits, stock(tokens[None], use_cache=False).logits)


def test_release_is_for_tools_that_want_plain_weights() -> None:
    fused, stock = pair()
    prepared = prepare(fused, lora="fused")
    logits(fused)
    assert not all(weight.is_contiguous() for weight in base_weights(fused))
    prepared.release_adapters()
    assert all(weight.is_contiguous() for weight in base_weights(fused))
    assert bordered(fused) == 0
    assert_same(fused, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_first_and_training_afterwards(mode: Any) -> None:
    fused, stock = pair()
    with mode():
        assert relative(logits(fused.eval()), logits(stock.eval())) < 1e-5
    assert bordered(fused) == 15
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
