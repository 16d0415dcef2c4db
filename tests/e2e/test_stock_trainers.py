"""transformers.Trainer and its flattening collator train a prepared hybrid as if every document were alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from trainer_cases import (
    BATCH,
    Record,
    Remembering,
    assert_same_training,
    hybrid,
    logits_alone,
    lora,
    loss_alone,
    losses,
    samples,
    training_values,
)
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from deltatune import CompileOptions, PackedCollator, prepare
from tiny import FAMILIES, tiny_model

# every set of the collator's options that says where documents begin
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "positions_and_cu_seq_lens": {"return_flash_attn_kwargs": True},
    "positions_and_seq_idx": {"return_seq_idx": True},
    "everything": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "cu_seq_lens_and_seq_idx": {"return_position_ids": False, "return_flash_attn_kwargs": True, "return_seq_idx": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "positions_from_two": {"position_ids_start": 2},
}
NOTHING = {"return_position_ids": False}


def run(model: Any, folder: Path, collator: Any, **changes: Any) -> tuple[Trainer, Record, Remembering]:
    record, remembering = Record(), Remembering(collator)
    arguments = TrainingArguments(**training_values(folder, **changes))
    trainer = Trainer(model, arguments, data_collator=remembering, train_dataset=samples(), callbacks=[record])
    trainer.train()
    return trainer, record, remembering


def flattening(**options: Any) -> DataCollatorWithFlattening:
    supported = DataCollatorWithFlattening.__init__.__code__.co_varnames
    if unknown := options.keys() - set(supported):
        pytest.skip(f"needs a transformers whose flattening collator knows {', '.join(unknown)}")
    return DataCollatorWithFlattening(**options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_that_of_lone_documents(options: dict[str, Any], tmp_path: Path) -> None:
    model = hybrid()
    stock = copy.deepcopy(model)
    prepare(model)
    trainer, record, remembering = run(model, tmp_path, flattening(**options))
    assert_same_training(trainer, record, stock, remembering.batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    stock = copy.deepcopy(model)
    prepare(model)
    trainer, record, remembering = run(model, tmp_path, flattening())
    assert_same_training(trainer, record, stock, remembering.batches)


@pytest.mark.parametrize(
    ("arguments", "training"),
    [
        ({"compile": CompileOptions(backend="aot_eager", dynamic=True)}, {"max_steps": 2}),
        ({}, {"gradient_checkpointing": True}),
        ({"checkpointing": "layer"}, {}),
    ],
    ids=["compiled", "stock_checkpointing", "checkpointing"],
)
def test_compiled_and_checkpointed(arguments: dict[str, Any], training: dict[str, Any], tmp_path: Path) -> None:
    # one layer is traced, a recurrent one, for batches of any length
    model = hybrid(layers=1, use_cache=False) if "compile" in arguments else hybrid()
    stock = copy.deepcopy(model)
    prepared = prepare(model, **arguments)
    trainer, record, remembering = run(model, tmp_path, flattening(), **training)
    assert_same_training(trainer, record, stock, remembering.batches)
    report = prepared.compile_report
    assert report is None or (report.breaks == report.recompiles == [] and list(report.graphs.values()) == [1])


def test_with_an_adapter(tmp_path: Path) -> None:
    model = peft.get_peft_model(hybrid(), lora())
    stock = copy.deepcopy(model)
    prepare(model)
    trainer, record, remembering = run(model, tmp_path, flattening())
    assert_same_training(trainer, record, stock, remembering.batches)
    assert all("lora_" in name for name in record.gradients[0])


def test_accumulated_batches_share_one_normalisation(tmp_path: Path) -> None:
    model = hybrid()
    stock = copy.deepcopy(model)
    prepare(model)
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    trainer, record, remembering = run(model, tmp_path, flattening(), **changes)
    halves = remembering.batches
    batches = [first + second for first, second in zip(halves[::2], halves[1::2], strict=True)]
    assert_same_training(trainer, record, stock, batches)


def test_evaluation_is_that_of_lone_documents(tmp_path: Path) -> None:
    model = hybrid()
    stock = copy.deepcopy(model)
    prepare(model)
    arguments = TrainingArguments(**training_values(tmp_path, per_device_eval_batch_size=len(samples())))
    trainer = Trainer(model, arguments, data_collator=flattening(), eval_dataset=samples())
    with torch.no_grad():
        expected = float(loss_alone(stock, samples()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_one_document_changed_leaves_the_others_bit_identical(options: dict[str, Any], training: bool) -> None:
    model = hybrid().train(training)
    prepare(model)
    features = samples()[:BATCH]
    lengths = [len(row["input_ids"]) for row in features]
    collator = flattening(**options)

    def logits() -> tuple[torch.Tensor, ...]:
        batch = collator(features)
        del batch["labels"]
        return model(**batch).logits[0].split(lengths)

    before = logits()
    for changed in range(len(features)):
        kept = features[changed]
        ids = [1 + token % 90 for token in kept["input_ids"]]
        features[changed] = {"input_ids": ids, "labels": ids}
        for number, (a, b) in enumerate(zip(before, logits(), strict=True)):
            assert torch.equal(a, b) == (number != changed), (changed, number)
        features[changed] = kept


def test_the_stock_model_leaks_where_ours_does_not(tmp_path: Path) -> None:
    stock = hybrid()
    trainer, _, remembering = run(copy.deepcopy(stock), tmp_path, flattening())
    with torch.no_grad():
        alone = float(loss_alone(stock, remembering.batches[0]))
    assert abs(losses(trainer)[0] - alone) > 1e-3 * alone


def test_a_batch_that_says_nothing_of_boundaries_is_one_document(tmp_path: Path) -> None:
    """Without positions, lengths or ids nothing tells where documents begin: a row is one document, as on any model.

    The separators in the labels still keep a document's first token from being a target.
    """
    model = hybrid()
    stock = copy.deepcopy(model)
    prepare(model)
    trainer, _, remembering = run(model, tmp_path, flattening(**NOTHING))
    batch = flattening()(remembering.batches[0])
    joined = stock(batch["input_ids"], labels=batch["labels"])
    assert losses(trainer)[0] == pytest.approx(joined.loss.item(), rel=1e-5)
    with torch.no_grad():
        alone = logits_alone(stock, remembering.batches[0])
    assert not torch.allclose(joined.logits[0, -len(alone[-1]) :], alone[-1], rtol=1e-2, atol=1e-2)


def test_a_separator_is_never_a_target() -> None:
    """A separator other than -100 would train the last token of a document to foretell it."""
    model = hybrid()
    prepare(model)
    features = samples()[:BATCH]
    usual, odd = flattening()(features), flattening(separator_id=7)(features)
    assert not torch.equal(usual["labels"], odd["labels"])
    assert torch.equal(model(**odd).loss, model(**usual).loss)


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": False}], ids=["dispatched", "not_dispatched"])
def test_a_stream_of_packs(config: dict[str, Any], tmp_path: Path) -> None:
    """accelerate's loader of an IterableDataset cuts every tensor of a batch to the batch's number of rows."""
    packs = [samples()[:4], samples()[4:8], samples()[8:12]]

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([{"samples": pack} for pack in packs])

    model = hybrid()
    stock = copy.deepcopy(model)
    prepare(model)
    record = Record()
    values = training_values(tmp_path, per_device_train_batch_size=1, accelerator_config=config)
    trainer = Trainer(
        model,
        TrainingArguments(**values | {"remove_unused_columns": False}),
        data_collator=PackedCollator(tokens_per_batch=128, pad_token_id=0),
        train_dataset=Stream(),
        callbacks=[record],
    )
    trainer.train()
    assert_same_training(trainer, record, stock, packs)
