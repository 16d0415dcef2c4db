"""The parts of a model whose weights are gathered as one where its weights are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from deltatune.hf import model as hf_model
from deltatune.hf.hooks import plain_linear
from deltatune.hf.peft import trained_copy

__all__ = ["gathered_units", "head_unit"]


def gathered_units(model: nn.Module) -> Iterator[nn.Module]:
    """Each decoder layer, an embedding and a head that share no weight, a vision tower; the rest is the model's own."""
    base, text = hf_model.base_model(model), hf_model.text_model(model)
    yield from text.layers
    embedding, head = base.get_input_embeddings(), hf_model.head_of(model)
    if head is not None and not {*embedding.parameters()} & {*head.parameters()}:
        yield embedding
    if (unit := head_unit(model)) is not None:
        yield unit
    holder: Any = getattr(base, "model", None)
    tower = getattr(holder, "visual", None)
    if tower is not None:
        yield tower


def head_unit(model: nn.Module) -> nn.Module | None:
    """The head, where it is gathered by itself: a linear layer that shares no weight, whose loss is one call.

    Another one is called for a chunk of the logits at a time, and would be gathered and reduced as often.
    """
    head: nn.Module | None = hf_model.head_of(model)
    if head is None or not plain_linear(trained_copy(head)):
        return None
    embedding = hf_model.base_model(model).get_input_embeddings()
    return None if {*embedding.parameters()} & {*head.parameters()} else head
