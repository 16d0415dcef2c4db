"""Qwen3-VL: the text model inside its conditional model keeps documents apart, with layers of ours, as one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltatune import CompileOptions, Sequences, prepare, verify
from tiny import documents, tiny_conditional

LENGTHS = [5, 1, 64, 30]
FAMILIES = ("qwen3_vl", "qwen3_vl_moe")


def loss_of_documents(model: Any, docs: list[torch.Tensor]) -> torch.Tensor:
    """The stock loss of each document alone, weighted as one pack weighs them."""
    targets = sum(len(doc) - 1 for doc in docs)
    losses = [model(input_ids=doc[None], labels=doc[None], use_cache=False).loss * (len(doc) - 1) for doc in docs]
    return sum(loss for loss, doc in zip(losses, docs, strict=True) if len(doc) > 1) / targets


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [None, CompileOptions(backend="aot_eager")], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_its_documents_alone(family: str, compiled: CompileOptions | None) -> None:
    stock, docs = tiny_conditional(family), documents(LENGTHS)
    model = copy.deepcopy(stock)
    prepared = prepare(model, compile=compiled)
    assert prepared.report.family == family
    expected = loss_of_documents(stock, docs)
    expected.backward()
    tokens = torch.cat(docs)[None]
    actual = model(input_ids=tokens, labels=tokens, sequences=Sequences.from_lengths(LENGTHS)).loss
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    found, right = gradients(model), gradients(stock)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_documents_independent(family: str) -> None:
    model = tiny_conditional(family)
    prepare(model)
    assert verify(model, lengths=LENGTHS).ok


def test_one_graph_for_any_documents() -> None:
    model = tiny_conditional("qwen3_vl")
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    for lengths in ([20, 30], [1, 9, 40], [50]):
        tokens = torch.cat(documents(lengths))[None]
        model(input_ids=tokens, labels=tokens, sequences=Sequences.from_lengths(lengths)).loss.backward()
    report = prepared.compile_report
    assert report is not None
    assert sum(report.graphs.values()) == 1
    assert not report.breaks
