"""The parts of a model whose weights are gathered as one where its weights are sharded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deltatune.hf import model as hf_model
from deltatune.hf.hooks import plain_linear
from deltatune.hf.peft import trained_copy

__all__ = ["gathered_units", "head_unit", "trained_beside_text"]


def gathered_units(model: nn.Module) -> Iterator[nn.Module]:
    """Each decoder layer, an embedding and a head that share no weight; the rest is the model's own.

    So is a vision tower: as a unit it would be gathered where a call brings images, by some ranks and not by others.
    """
    base, text = hf_model.base_model(model), hf_model.text_model(model)
    yield from text.layers
    embedding, head = base.get_input_embeddings(), hf_model.head_of(model)
    if head is not None and not {*embedding.parameters()} & {*head.parameters()}:
        yield embedding
    if (unit := head_unit(model)) is not None:
        yield unit


def head_unit(model: nn.Module) -> nn.Module | None:
    """The head, where it is gathered by itself: a linear layer that shares no weight, whose loss is one call.

    Another one is called for a chunk of the logits at a time, and would be gathered and reduced as often.
    """
    head: nn.Module | None = hf_model.head_of(model)
    if head is None or not plain_linear(trained_copy(head)):
        return None
    embedding = hf_model.base_model(model).get_input_embeddings()
    return None if {*embedding.parameters()} & {*head.parameters()} else head


def trained_beside_text(model: nn.Module) -> list[str]:
    """Names of weights that train outside of the text model and the head, such as a vision tower's.

    A call with text alone gives them no gradient.
    """
    head = hf_model.head_of(model)
    text = {*hf_model.text_model(model).parameters(), *(() if head is None else head.parameters())}
    return [name for name, weight in model.named_parameters() if weight.requires_grad and weight not in text]
