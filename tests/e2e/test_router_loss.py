"""The router's auxiliary loss over micro-batches and ranks: its mean, weighted by trained targets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from trainer_cases import Remembering, losses, training_values
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from deltatune import CompileOptions, Sequences, prepare
from tiny import documents, tiny_conditional, tiny_model

COEFFICIENT = 0.5
LENGTHS = [9, 30, 4, 17]
TEXT_MODELS = ("qwen3_moe", "qwen3_5_moe", "gpt_oss")


def routed(family: str = "qwen3_moe", layers: int = 2) -> Any:
    """A model that returns its router's loss, at a coefficient where it cannot be overlooked."""
    model = tiny_conditional("qwen3_5_moe") if family == "conditional" else tiny_model(family, layers=layers)
    text = model.config.get_text_config()
    model.config.output_router_logits = text.output_router_logits = True
    model.router_aux_loss_coef = text.router_aux_loss_coef = COEFFICIENT
    return model


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Documents and their labels; of every second one only the last two tokens train."""
    found = []
    for number, tokens in enumerate(documents(LENGTHS)):
        labels = tokens.clone()
        labels[: 0 if number % 2 else -2] = -100
        found.append((tokens, labels))
    return found


def parts_alone(stock: Any, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Summed cross-entropy, auxiliary loss and targets of one document, by the stock model."""
    output = stock(input_ids=tokens[None], output_router_logits=True)
    targets = labels[1:]
    nll = F.cross_entropy(output.logits[0, :-1].float(), targets, reduction="sum")
    return nll, output.aux_loss, int((targets != -100).sum())


def expected_loss(stock: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return weighted_mean([parts_alone(stock, *batch) for batch in batches])


def weighted_mean(parts: list[tuple[torch.Tensor, torch.Tensor, int]]) -> torch.Tensor:
    """``(sum nll + coefficient * sum(targets * aux)) / sum targets``."""
    total = sum(nll + COEFFICIENT * count * aux for nll, aux, count in parts)
    return total / sum(count for *_, count in parts)


def mean_of_own(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
    """A loss that is not the stock one."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
    return F.cross_entropy(logits.float().flatten(0, -2), targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "conditional"])
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_calls_that_share_the_number_of_items_add_up(family: str, own_loss: bool, as_tensor: bool) -> None:
    model = routed(family)
    stock = copy.deepcopy(model)
    prepare(model)
    if own_loss:
        model.loss_function = mean_of_own
    expected_loss(stock, rows()).backward()
    items: Any = sum(int((labels[1:] != -100).sum()) for _, labels in rows())
    items = torch.tensor(items) if as_tensor else items
    total = 0.0
    for tokens, labels in rows():
        call = {"input_ids": tokens[None], "labels": labels[None], "num_items_in_batch": items}
        loss = model(**call, output_router_logits=True).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected_loss(stock, rows()).item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("family", "own_loss", "compiled"),
    [
        *((family, own_loss, False) for family in (*TEXT_MODELS, "conditional") for own_loss in (False, True)),
        # the loss is not in the compiled layers, and those of the conditional model are qwen3_5_moe's
        *(("qwen3_moe", True, True), ("gpt_oss", False, True), ("conditional", False, True)),
    ],
)
def test_packs_in_one_batch_count_as_packs_one_after_another(family: str, own_loss: bool, compiled: bool) -> None:
    """Four packs ``[4, T]``, padded, of which another number of tokens train; and each of them in a call of its own."""
    layers = 1 if compiled and family == "gpt_oss" else 2  # its second layer would be a graph of its own
    model, packs = routed(family, layers), rows()
    one_by_one = copy.deepcopy(model)
    prepare(model, compile=CompileOptions(backend="aot_eager") if compiled else None)
    prepare(one_by_one)
    for each in (model, one_by_one):
        if own_loss:
            each.loss_function = mean_of_own
    tokens = torch.stack([F.pad(ids, (0, 30 - len(ids))) for ids, _ in packs])
    labels = torch.stack([F.pad(of, (0, 30 - len(of)), value=-100) for _, of in packs])
    mask = torch.stack([(torch.arange(30) < len(ids)).long() for ids, _ in packs])
    items = int((labels[:, 1:] != -100).sum())
    # transformers 5.17 reads it of a call alone in models of images and text
    shared = {"num_items_in_batch": items, "output_router_logits": True}
    at_once = model(input_ids=tokens, labels=labels, attention_mask=mask, **shared).loss
    at_once.backward()
    total = 0.0
    for row in range(4):
        call = {"input_ids": tokens[row:][:1], "labels": labels[row:][:1], "attention_mask": mask[row:][:1]}
        loss = one_by_one(**call, **shared).loss
        loss.backward()
        total += loss.item()
    assert at_once.item() == pytest.approx(total, rel=1e-5)
    assert at_once.item() == pytest.approx(expected_loss(routed(family, layers), packs).item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), one_by_one.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, name


@pytest.mark.parametrize("own_loss", [False, True])
def test_a_call_without_targets_adds_nothing(own_loss: bool) -> None:
    model = routed()
    prepare(model)
    if own_loss:
        model.loss_function = mean_of_own
    tokens = documents([8])[0][None]
    output = model(input_ids=tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=5)
    assert output.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.aux_loss.item() > 0.5


def test_shifted_labels_have_the_weight_of_the_same_labels_unshifted() -> None:
    model = routed()
    prepare(model)
    tokens, labels = (torch.cat(part)[None] for part in zip(*rows(), strict=True))
    call = {"input_ids": tokens, "sequences": Sequences.from_lengths(LENGTHS), "num_items_in_batch": 100}
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = model(**call, labels=labels).loss
    torch.testing.assert_close(model(**call, shift_labels=shifted).loss, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_the_stock_trainer_trains_by_the_weighted_mean(accumulated: int, tmp_path: Path) -> None:
    """One document a row, so that a batch of several has one auxiliary loss of its own."""
    model = routed()
    stock = copy.deepcopy(model)
    prepare(model)
    features = [{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in rows()]
    arguments = transformers.TrainingArguments(
        **training_values(
            tmp_path,
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=4 // accumulated,
            max_steps=1,
            learning_rate=0.0,
        )
    )
    collator = Remembering(transformers.DataCollatorWithFlattening())
    trainer = transformers.Trainer(model, arguments, data_collator=collator, train_dataset=features)
    trainer.train()
    (loss,) = losses(trainer)
    groups = [[torch.tensor(row["input_ids"]) for row in batch] for batch in collator.batches[:accumulated]]
    labels = [[torch.tensor(row["labels"]) for row in batch] for batch in collator.batches[:accumulated]]
    parts = [group_alone(stock, *group) for group in zip(groups, labels, strict=True)]
    expected = weighted_mean(parts).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def group_alone(
    stock: Any, tokens: list[torch.Tensor], labels: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """As ``parts_alone`` for documents in one batch: each a forward of its own, their routers' loss over all tokens."""
    outputs = [stock(input_ids=ids[None], output_router_logits=True) for ids in tokens]
    logits = tuple(torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs), strict=True))
    text = stock.config
    aux = load_balancing_loss_func(logits, text.num_experts, text.num_experts_per_tok)
    parts = [parts_alone(stock, *pair) for pair in zip(tokens, labels, strict=True)]
    return sum(nll for nll, *_ in parts), aux, sum(count for *_, count in parts)
