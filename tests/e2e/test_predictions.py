"""Evaluating with metrics: a prepared model gives trainers the logits that the stock model gives them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import trl
from trainer_cases import hybrid, logits_alone, loss_alone, samples, tokenizer, training_values
from transformers import DataCollatorWithFlattening, EvalPrediction, Trainer, TrainingArguments

from deltatune import prepare
from tiny import VOCAB, documents, tiny_model

BATCH = 4


def prepared_and_stock(family: str = "qwen3_5") -> tuple[Any, Any]:
    model = tiny_model(family)
    stock = copy.deepcopy(model)
    prepare(model)
    return model, stock


def stock_trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    changes = {name: options.pop(name) for name in ("prediction_loss_only",) if name in options}
    arguments = TrainingArguments(**training_values(folder, per_device_eval_batch_size=BATCH, **changes))
    return Trainer(model, arguments, data_collator=DataCollatorWithFlattening(), eval_dataset=samples(), **options)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Of whole logits, or of tokens that were chosen before."""
    chosen = found.predictions if found.predictions.ndim == 2 else found.predictions.argmax(-1)
    targets = found.label_ids[:, 1:]
    return {"accuracy": float((chosen[:, :-1] == targets)[targets != -100].mean())}


def accuracy_alone(stock: Any) -> float:
    right = []
    for row, logits in zip(samples(), logits_alone(stock, samples()), strict=True):
        targets = torch.tensor(row["labels"])[1:]
        right += (logits.argmax(-1)[:-1] == targets)[targets != -100].tolist()
    return float(np.mean(right))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_moe"])
def test_predict_returns_the_logits_of_lone_documents(family: str, tmp_path: Path) -> None:
    model, stock = prepared_and_stock(family)
    found = stock_trainer(model, tmp_path).predict(samples()).predictions
    with torch.no_grad():
        expected = logits_alone(stock, samples())
    for number in range(0, len(expected), BATCH):
        batch = torch.cat(expected[number : number + BATCH])
        # rows of predictions are padded to the longest batch
        row = torch.from_numpy(found[number // BATCH, : len(batch)])
        torch.testing.assert_close(row, batch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen_first", [False, True])
def test_metrics_are_those_of_lone_documents(chosen_first: bool, tmp_path: Path) -> None:
    model, stock = prepared_and_stock()
    shapes = []

    def choose(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return logits.argmax(-1)

    trainer = stock_trainer(
        model, tmp_path, compute_metrics=accuracy, preprocess_logits_for_metrics=choose if chosen_first else None
    )
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(accuracy_alone(stock))
    assert all(shape[0] == 1 and shape[2] == VOCAB for shape in shapes)
    assert len(shapes) == (3 if chosen_first else 0)


@pytest.mark.parametrize("options", [{}, {"prediction_loss_only": True}], ids=["default", "loss_only"])
def test_the_loss_of_an_evaluation_does_not_depend_on_metrics(options: dict[str, Any], tmp_path: Path) -> None:
    model, stock = prepared_and_stock()
    trainer = stock_trainer(model, tmp_path, **options)
    found = trainer.predict(samples())
    assert (found.predictions is None) == bool(options)
    with torch.no_grad():
        batches = [samples()[number : number + BATCH] for number in range(0, len(samples()), BATCH)]
        expected = float(np.mean([loss_alone(stock, batch) for batch in batches]))
    assert found.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_collator_that_wants_no_logits_saves_them_in_an_evaluation_of_the_loss(tmp_path: Path) -> None:
    model, _ = prepared_and_stock()
    trainer = stock_trainer(model, tmp_path, prediction_loss_only=True)
    expected, held = trainer.evaluate()["eval_loss"], []
    model.register_forward_hook(lambda _module, _inputs, output: held.append(output.logits))
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "output_logits": False}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert held == [None] * 3


def test_metrics_while_training_leave_its_steps_without_logits(tmp_path: Path) -> None:
    model, _ = prepared_and_stock()
    held = []
    model.register_forward_hook(lambda module, _inputs, output: held.append((module.training, output.logits is None)))
    arguments = training_values(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=BATCH)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        data_collator=DataCollatorWithFlattening(),
        train_dataset=samples(),
        eval_dataset=samples(),
        compute_metrics=accuracy,
    )
    trainer.train()
    assert set(held) == {(True, True), (False, False)}
    assert sum("eval_accuracy" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.filterwarnings("ignore:.return_outputs=True.:FutureWarning")
@pytest.mark.parametrize("with_metrics", [False, True])
def test_trl_evaluates(with_metrics: bool, tmp_path: Path) -> None:
    model, stock = hybrid(), hybrid()
    prepare(model)
    datasets.disable_progress_bars()
    values = training_values(tmp_path, padding_free=True, max_length=None, bf16=False, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**values, per_device_eval_batch_size=BATCH),
        train_dataset=datasets.Dataset.from_list(samples()),
        eval_dataset=datasets.Dataset.from_list(samples()),
        processing_class=tokenizer(),
        compute_metrics=accuracy if with_metrics else None,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    if with_metrics:
        assert metrics["eval_accuracy"] == pytest.approx(accuracy_alone(stock))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [None, True, False])
def test_who_asks_decides_and_else_the_mode(training: bool, wanted: bool | None) -> None:
    model, stock = prepared_and_stock()
    model.train(training)
    (tokens,) = documents([20])
    call = {"input_ids": tokens[None], "labels": tokens[None]}
    output = model(**call, output_logits=wanted)
    expected = stock(**call)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    if (not training) if wanted is None else wanted:
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    else:
        assert output.logits is None
    last = model(**call, logits_to_keep=3).logits
    torch.testing.assert_close(last, expected.logits[:, -3:], rtol=1e-4, atol=1e-5)
