"""TRL's trainers on a prepared hybrid: padding-free fine-tuning and preference training are those of lone documents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl

from deltatune import CompileOptions, prepare
from tiny import documents
from trainer_cases import (
    BATCH,
    STEPS,
    Record,
    Remembering,
    assert_same_training,
    hybrid,
    lora,
    loss_alone,
    losses,
    samples,
    tokenizer,
    training_values,
)

TRACED = CompileOptions(backend="aot_eager")
# what TRL turns on unasked, off for comparisons in single precision
PLAIN = {"bf16": False, "gradient_checkpointing": False}


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def sft(model: Any, folder: Path, adapter: Any = None, **changes: Any) -> tuple[Any, Record, Remembering]:
    """A padding-free run: TRL replaces ``model.forward`` on the instance by its own fused head."""
    record = Record()
    values = training_values(folder, padding_free=True, max_length=None, **{**PLAIN, **changes})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**values),
        train_dataset=datasets.Dataset.from_list(samples()),
        processing_class=tokenizer(),
        callbacks=[record],
        peft_config=adapter,
    )
    assert "forward" in trainer.accelerator.unwrap_model(trainer.model).__dict__ or adapter is not None
    trainer.data_collator = remembering = Remembering(trainer.data_collator)
    trainer.train()
    return trainer, record, remembering


def adapted_like(trainer: Any, start: dict[str, torch.Tensor]) -> Any:
    """A stock model with the adapter that the trainer began with."""
    stock = peft.get_peft_model(hybrid(), lora())
    stock.load_state_dict(start)
    return stock


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ({}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"pad_to_multiple_of": 32}),
        ({}, {"packing": True, "max_length": 64}),
        ({"checkpointing": "layer"}, {}),
        ({"compile": TRACED}, {"gradient_checkpointing": True}),
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


@pytest.mark.parametrize("given", ["peft_config", "peft_model"])
def test_an_adapter_trains_as_on_lone_documents(given: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hybrid()
    adapter = None
    if given == "peft_config":
        prepare(model)
        adapter = lora()
    else:
        model = peft.get_peft_model(model, lora())
        prepare(model)
    starts: list[dict[str, torch.Tensor]] = []
    trainer, record, remembering = sft_from(model, tmp_path, adapter, starts)
    stock = peft.get_peft_model(hybrid(), lora())
    stock.load_state_dict(starts[0])
    assert_same_training(trainer, record, stock, remembering.batches)
    assert all("lora_" in name for name in record.gradients[0])
