"""TRL's trainers on a prepared hybrid: padding-free fine-tuning and preference training are those of lone documents."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from trainer_cases import (
    Record,
    Remembering,
    assert_same_training,
    hybrid,
    lora,
    loss_alone,
    losses,
    samples,
    tokenizer,
    train_alone,
    training_values,
)

from deltatune import CompileOptions, prepare
from tiny import documents, tiny_model

TRACED = CompileOptions(backend="aot_eager")
# what TRL turns on unasked, off for comparisons in single precision
PLAIN = {"bf16": False, "gradient_checkpointing": False}


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def sft(model: Any, folder: Path, adapter: Any = None, **changes: Any) -> tuple[Any, Record, Remembering]:
    """A padding-free run: TRL replaces ``model.forward`` on the instance by its own fused head."""
    record = Record()
    values = training_values(folder, padding_free=True, **{"max_length": None, **PLAIN, **changes})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**values),
        train_dataset=datasets.Dataset.from_list(samples()),
        processing_class=tokenizer(),
        callbacks=[record],
        peft_config=adapter,
    )
    base = trainer.model.get_base_model() if isinstance(trainer.model, peft.PeftModel) else trainer.model
    assert "forward" in base.__dict__
    trainer.data_collator = remembering = Remembering(trainer.data_collator)
    trainer.train()
    return trainer, record, remembering


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ({}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"pad_to_multiple_of": 32}),
        ({}, {"packing": True, "max_length": 64}),
        ({"checkpointing": "layer"}, {}),
        ({"compile": TRACED}, {"gradient_checkpointing": True, "max_steps": 1}),
    ],
    ids=["plain", "stock_checkpointing", "padded", "packed", "checkpointed", "compiled_under_stock_checkpointing"],
)
def test_padding_free_training_is_that_of_lone_documents(
    arguments: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    model = hybrid()
    stock = copy.deepcopy(model)
    prepared = prepare(model, **arguments)
    trainer, record, remembering = sft(model, tmp_path, **changes)
    assert_same_training(trainer, record, stock, [unpacked(batch) for batch in remembering.batches])
    assert prepared.compile_report is None or prepared.compile_report.breaks == []


def unpacked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents of TRL's rows, which hold several where it packed them."""
    found = []
    for row in rows:
        start = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            found.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
            start += length
    return found


def test_experts_without_their_balancing_loss(tmp_path: Path) -> None:
    """The balancing loss couples documents by definition, so the comparison leaves it out."""
    model = tiny_model("qwen3_5_moe")
    stock = copy.deepcopy(model)
    prepare(model)
    trainer, record, remembering = sft(model, tmp_path, router_aux_loss_coef=0.0)
    assert_same_training(trainer, record, stock, remembering.batches)


@pytest.mark.parametrize("given", ["peft_config", "peft_model"])
def test_an_adapter_trains_as_on_lone_documents(given: str, tmp_path: Path) -> None:
    model = hybrid() if given == "peft_config" else peft.get_peft_model(hybrid(), lora())
    prepare(model)
    trainer, record, remembering = sft(model, tmp_path, adapter=lora() if given == "peft_config" else None)
    stock = peft.get_peft_model(hybrid(), lora())
    stock.load_state_dict(record.start)
    assert_same_training(trainer, record, stock, remembering.batches)
    assert all("lora_" in name for name in record.gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_defaults_are_as_exact_as_on_lone_documents(dtype: torch.dtype, tmp_path: Path) -> None:
    """With bf16 and checkpointing on, as TRL has them: no further from single precision than the stock model alone."""
    model = hybrid()
    exact, stock = copy.deepcopy(model), copy.deepcopy(model).to(dtype)
    prepare(model.to(dtype))
    trainer, record, remembering = sft(model, tmp_path, bf16=None, gradient_checkpointing=True)
    assert trainer.args.bf16
    first = [unpacked(remembering.batches[0])]
    (loss,), (expected,) = train_alone(exact, first)
    with torch.autocast("cpu", torch.bfloat16):
        _, (rounded,) = train_alone(stock, first)
    assert losses(trainer)[0] == pytest.approx(loss, rel=5e-3)
    for name, gradient in expected.items():
        allowed = 2 * (rounded[name].float() - gradient).norm()
        assert (record.gradients[0][name].float() - gradient).norm() <= allowed, name


@pytest.mark.parametrize("autocast", [False, True])
def test_one_document_changed_leaves_the_others_bit_identical(autocast: bool, tmp_path: Path) -> None:
    model = hybrid()
    prepare(model)
    trainer, _, remembering = sft(model, tmp_path, max_steps=1, bf16=autocast)
    features = remembering.batches[0]
    lengths = [len(row["input_ids"]) for row in features]

    def log_probs() -> tuple[torch.Tensor, ...]:
        batch = remembering.collator(features)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = trainer.model(**batch, fused_lm_head=True).log_probs[0]
        return torch.nn.functional.pad(found, (1, 0)).split(lengths)

    before = log_probs()
    for changed, kept in enumerate(features):
        ids = [1 + token % 90 for token in kept["input_ids"]]
        features[changed] = {"input_ids": ids, "labels": ids}
        after = log_probs()
        assert all(torch.equal(a, b) for n, (a, b) in enumerate(zip(before, after, strict=True)) if n != changed)
        assert len(ids) == 1 or not torch.equal(before[changed], after[changed])
        features[changed] = kept


def test_the_stock_model_cannot_keep_them_apart(tmp_path: Path) -> None:
    """What the comparisons above would catch: the stock hybrid refuses such a batch, or trains with a leak."""
    stock = hybrid()
    with contextlib.suppress(ValueError):
        trainer, _, remembering = sft(copy.deepcopy(stock), tmp_path)
        with torch.no_grad():
            alone = loss_alone(stock, remembering.batches[0]).item()
        assert abs(losses(trainer)[0] - alone) > 1e-3 * alone


def test_reverting_after_a_run_leaves_a_model_that_answers(tmp_path: Path) -> None:
    """TRL's replacement of ``model.forward`` holds on to the forward of the day, which was ours."""
    model = hybrid()
    prepared = prepare(model)
    sft(model, tmp_path, max_steps=1)
    (tokens,) = documents([20])
    before = model(tokens[None], labels=tokens[None])
    prepared.revert()
    after = model(tokens[None], labels=tokens[None])
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-6, atol=0)
    assert after.logits.shape[1] == 20


def preferences() -> list[dict[str, str]]:
    def words(lengths: list[int], seed: int) -> list[str]:
        return [" ".join(f"<{token}>" for token in ids.tolist()) for ids in documents(lengths, seed)]

    columns = words([5, 3, 9, 4, 6, 2], 1), words([8, 4, 30, 5, 1, 9], 2), words([3, 7, 12, 20, 6, 5], 3)
    return [
        {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for prompt, chosen, rejected in zip(*columns, strict=True)
    ]


BETA = 0.1


def preference_alone(model: Any, rows: list[dict[str, Any]], reference: Any = None) -> torch.Tensor:
    """``mean -log sigmoid(beta * (margin - reference margin))``, every completion a forward of its own.

    The reference is a model, or else the trained one with its adapter disabled.
    """
    terms = []
    for row in rows:
        with torch.no_grad(), contextlib.nullcontext() if reference else model.disable_adapter():
            anchor = margin(reference or model, row)
        terms.append(-torch.nn.functional.logsigmoid(BETA * (margin(model, row) - anchor)))
    return torch.stack(terms).mean()


def margin(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """How much more likely the chosen completion is than the rejected one, in nats."""
    prompt, found = row["prompt_ids"], []
    for completion in (row["chosen_ids"], row["rejected_ids"]):
        tokens = torch.tensor(prompt + completion)
        predictions = model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(predictions.gather(1, tokens[len(prompt) :, None]).sum())
    return found[0] - found[1]


@pytest.mark.parametrize(
    ("arguments", "reference"),
    [({}, "disabled"), ({}, "copied"), ({"compile": TRACED}, "disabled")],
    ids=["adapter_disabled", "adapter_copied", "compiled"],
)
def test_preference_training_is_that_of_lone_documents(
    arguments: dict[str, Any], reference: str, tmp_path: Path
) -> None:
    """Two forwards before one backward. TRL's reference for a new adapter is the model without it, and for an adapter
    that exists a frozen copy of it.
    """
    new = reference == "disabled"
    build = functools.partial(hybrid, layers=1, use_cache=False) if arguments else hybrid  # one layer to trace
    model = build() if new else peft.get_peft_model(build(), lora())
    stock = peft.get_peft_model(build(), lora())
    prepared = prepare(model, **arguments)
    record = Record()
    values = training_values(tmp_path, per_device_train_batch_size=2, beta=BETA, pad_to_multiple_of=48, **PLAIN)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**values),
        train_dataset=datasets.Dataset.from_list(preferences()),
        processing_class=tokenizer(),
        callbacks=[record],
        peft_config=lora() if new else None,
    )
    assert trainer.ref_model is None
    trainer.data_collator = remembering = Remembering(trainer.data_collator)
    trainer.train()
    stock.load_state_dict({name: value for name, value in record.start.items() if ".ref." not in name})
    loss_of = functools.partial(preference_alone, reference=None if new else copy.deepcopy(stock))
    assert_same_training(trainer, record, stock, remembering.batches, loss_of)
    assert abs(losses(trainer)[-1] - math.log(2)) > 1e-3
    report = prepared.compile_report
    # of each type of layer one graph with the adapter, one for the reference
    assert report is None or (report.breaks == [] and set(report.graphs.values()) == {1})
