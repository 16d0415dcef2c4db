"""Packed documents that tests hand to prepared models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune import Sequences
from tiny import documents

LENGTHS = [5, 1, 30, 7]


def packed_call(**extra: Any) -> dict[str, Any]:
    return {"input_ids": torch.cat(documents(LENGTHS))[None], "sequences": Sequences.from_lengths(LENGTHS), **extra}


def alone(model: Any, lengths: list[int] = LENGTHS) -> float:
    """The stock model's loss on each document alone, and its gradients in ``.grad``."""
    docs, total = documents(lengths), 0.0
    targets = sum(n - 1 for n in lengths)
    for doc in docs:
        if len(doc) > 1:
            logits = model(input_ids=doc[None], use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, doc[1:], reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
    return total


def packed(model: Any, **extra: Any) -> float:
    """The loss of the same documents in a pack, and its gradients."""
    loss = model(**packed_call(labels=packed_call()["input_ids"], **extra)).loss
    loss.backward()
    return float(loss.detach())


def assert_same_gradients(model: nn.Module, stock: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
