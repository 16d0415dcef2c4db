"""Gradients of packs in 16 bits, against float64: at most twice as far as plain torch is, document by document."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deltatune import Sequences, prepare
from mixtures import OTHERS, mixture
from packed_cases import LENGTHS
from tiny import FAMILIES, documents, tiny_conditional

#: Packs whose errors are added up: the error of a few numbers alone, such as sinks, is chance.
PACKS = 3


def every_expert(family: str) -> Any:
    """A model whose tokens all go to all experts: rounding must not send a token elsewhere in one of three models."""
    model = tiny_conditional(family) if family == "qwen3_vl" else mixture(family)
    for module in model.modules():
        for name in ("top_k", "num_experts_per_tok", "moe_topk"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, 4)
        if hasattr(module, "topk_group"):
            module.topk_group = module.num_group
    return model


def summed_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:-1].to(wide), tokens[1:], reduction="sum") / 8


def train_alone(model: Any, docs: list[torch.Tensor]) -> None:
    for doc in docs:
        if len(doc) > 1:
            summed_loss(model(input_ids=doc[None], use_cache=False).logits[0], doc).backward()


def train_packed(model: Any, docs: list[torch.Tensor]) -> None:
    logits = model(torch.cat(docs)[None], sequences=Sequences.from_lengths(LENGTHS)).logits[0].split(LENGTHS)
    sum(summed_loss(each, doc) for each, doc in zip(logits, docs, strict=True) if len(doc) > 1).backward()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in (*FAMILIES, "qwen3_vl", "qwen3_vl_moe", *OTHERS)),
        *((family, torch.float16) for family in FAMILIES),
    ],
)
def test_errors_are_at_most_twice_those_of_plain_torch(family: str, dtype: torch.dtype) -> None:
    found = every_expert(family).to(dtype)
    plain = copy.deepcopy(found)
    plain.set_experts_implementation("eager")
    exact = copy.deepcopy(plain).double()
    prepare(found)
    squares: dict[str, list[float]] = {}
    for seed in range(PACKS):
        docs = documents(LENGTHS, seed)
        for model in (found, plain, exact):
            model.zero_grad(set_to_none=True)
        train_packed(found, docs)
        train_alone(plain, docs)
        train_alone(exact, docs)
        for (name, right), ours, theirs in zip(
            exact.named_parameters(), found.parameters(), plain.parameters(), strict=True
        ):
            if right.grad is not None and right.grad.any():
                errors = [float((each.grad.double() - right.grad).square().sum()) for each in (ours, theirs)]
                squares[name] = [a + b for a, b in zip(squares.get(name, [0, 0]), errors, strict=True)]
    assert len(squares) > 10
    assert {name: each for name, each in squares.items() if each[0] > 4 * each[1]} == {}
