"""packed(docs) == [each doc alone] for whole models: logits, loss, every gradient, and nothing between documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltatune import Sequences, prepare
from tiny import FAMILIES, documents, tiny_conditional, tiny_model

LENGTHS = {
    "short": [5, 1, 70, 7],
    "long": [127, 257, 64],
    "chunk_edges": [3, 2, 1, 63, 64, 65],
    "seventy": [1 + i % 5 for i in range(70)],
}
TOLERANCE = 1e-5


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 error relative to the expected norm."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def summed_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token loss of one document, summed; zero for a document of one token."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str, lengths: list[int]) -> None:
    model = tiny_model(family)
    prepare(model)
    docs = documents(lengths)
    alone = [model(doc[None]).logits[0] for doc in docs]
    sum(summed_loss(logits, doc) for logits, doc in zip(alone, docs, strict=True)).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    total = sum(lengths) + 9  # a padding tail
    tokens = torch.cat([*docs, torch.zeros(9, dtype=torch.long)])[None]
    sequences = Sequences.from_lengths(lengths, total=total)
    packed = model(tokens, sequences=sequences).logits[0, : sum(lengths)].split(lengths)
    sum(summed_loss(logits, doc) for logits, doc in zip(packed, docs, strict=True)).backward()

    assert max(relative(p, a) for p, a in zip(packed, alone, strict=True)) < TOLERANCE
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    assert {n: e for n in expected if (e := relative(actual[n], expected[n])) >= TOLERANCE} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_sum_over_documents(family: str) -> None:
    model = tiny_model(family)
    prepare(model)
    lengths = [5, 1, 70, 7]
    docs = documents(lengths)
    tokens = torch.cat(docs)[None]
    loss = model(tokens, labels=tokens, sequences=Sequences.from_lengths(lengths)).loss
    alone = sum(summed_loss(model(doc[None]).logits[0], doc) for doc in docs)
    torch.testing.assert_close(loss, alone / (sum(lengths) - len(lengths)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_ids_that_restart(family: str) -> None:
    model = tiny_model(family)
    prepare(model)
    rows = [[20, 11], [7, 9, 15]]
    docs = [documents(row, seed=i) for i, row in enumerate(rows)]
    tokens = torch.stack([torch.cat(row) for row in docs])
    ids = torch.stack([torch.repeat_interleave(torch.arange(1, len(r) + 1), torch.tensor(r)) for r in rows])
    logits = model(tokens, attention_mask=ids).logits
    for row, pieces in zip(logits, docs, strict=True):
        for packed, doc in zip(row.split([len(d) for d in pieces]), pieces, strict=True):
            assert relative(packed, model(doc[None]).logits[0]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_between_documents(family: str) -> None:
    model = tiny_model(family)
    prepare(model)
    lengths = [5, 1, 70, 7]
    embeddings = model.get_input_embeddings()(torch.cat(documents(lengths)))[None].detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, sequences=Sequences.from_lengths(lengths)).logits[0]
    for i, part in enumerate(logits.split(lengths)):
        (gradient,) = torch.autograd.grad(part.square().sum(), embeddings, retain_graph=True)
        for j, other in enumerate(gradient[0].split(lengths)):
            assert bool(other.abs().sum() > 0) == (i == j)


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_document_changes_no_other_bit(family: str) -> None:
    model = tiny_model(family)
    prepare(model)
    lengths = [5, 1, 70, 7, 33]
    docs = documents(lengths)
    changed = [*docs[:2], (docs[2] + 1) % 96, *docs[3:]]

    def outputs(pieces: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = model.get_input_embeddings()(torch.cat(pieces))[None].detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, sequences=Sequences.from_lengths(lengths)).logits[0]
        (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings)
        return logits, gradient[0]

    for before, after in zip(outputs(docs), outputs(changed), strict=True):
        for i, (a, b) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
            assert torch.equal(a, b) == (i != 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_documents_match_the_stock_model(family: str) -> None:
    stock = tiny_model(family)
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([97])
    for m in (stock, model):
        m(tokens[None], labels=tokens[None], use_cache=False).loss.backward()
    assert relative(model(tokens[None]).logits, stock(tokens[None], use_cache=False).logits) < TOLERANCE
    expected, actual = gradients(stock), gradients(model)
    assert actual.keys() == expected.keys()
    assert {n: e for n in expected if (e := relative(actual[n], expected[n])) >= TOLERANCE} == {}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_text_path_of_a_conditional_generation_model(family: str) -> None:
    model = tiny_conditional(family)
    stock = copy.deepcopy(model)
    report = prepare(model).report
    assert report.family == family
    lengths = [5, 1, 70, 7]
    docs = documents(lengths)
    tokens = torch.cat(docs)[None]
    packed = model(tokens, sequences=Sequences.from_lengths(lengths)).logits[0].split(lengths)
    for part, doc in zip(packed, docs, strict=True):
        assert relative(part, stock(doc[None], use_cache=False).logits[0]) < TOLERANCE
    positions = Sequences.from_lengths(lengths).positions.long()[None]
    four_rows = positions.expand(4, 1, -1)
    for part, doc in zip(model(tokens, position_ids=four_rows).logits[0].split(lengths), docs, strict=True):
        assert relative(part, stock(doc[None], use_cache=False).logits[0]) < TOLERANCE
    with pytest.raises(ValueError, match="hold no document boundaries"):
        model(tokens, position_ids=positions.expand(3, 1, -1))
