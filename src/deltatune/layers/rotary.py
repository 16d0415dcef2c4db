"""Rotary embeddings whose frequencies depend on how long a document is, computed for every document as if alone."""

# B rows, T tokens a row, N = B * T, R rotary width

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deltatune.hf.cached import boundaries
from deltatune.layers.rope_types import depends_on_length
from deltatune.packing.sequences import Sequences
from deltatune.subclass import Swapped, stock_class

__all__ = ["DocumentRotary", "forget_lengths", "length_dependent_rotary"]


class DocumentRotary(Swapped):
    """A rotary embedding of type ``longrope`` or ``dynamic``: the frequencies of a token are those of its document.

    The stock module takes the longest position of a call for the length of everything in it, and ``dynamic`` remembers
    it. Here the stock forward runs once for each length that has frequencies of its own, every time from its first
    state, and each token takes the result of its own document's length.
    """

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """``(x, position_ids [.., B, T]) -> cos, sin [.., B, T, R]``, of one type of layer where types differ."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        sequences = boundaries()
        if sequences is None:
            return super().forward(x, position_ids, **named)
        with torch.no_grad():
            return _by_document(self, sequences, x, position_ids, named)


def length_dependent_rotary(text_model: Any) -> tuple[nn.Module, ...]:
    """The rotary embeddings of a text model whose frequencies depend on a call's longest position.

    Raises:
        ValueError: one inside a decoder layer, where it would run in the layer's graph and be recomputed in backward.
    """
    found = tuple(module for module in text_model.modules() if any(map(depends_on_length, _rope_types(module))))
    inside = {module for layer in text_model.layers for module in layer.modules()}
    for module in found:
        if module in inside:
            raise ValueError(
                f"{stock_class(module).__name__} inside a decoder layer has frequencies that depend on the longest "
                f"position of a call (rope_type {', '.join(_rope_types(module))}), and so on what else is in the pack; "
                "set a rope_type whose frequencies do not, such as 'yarn'"
            )
    return found


def _rope_types(module: nn.Module) -> list[str]:
    given = getattr(module, "rope_type", None)
    kinds = given.values() if isinstance(given, dict) else (given,)
    return [kind for kind in kinds if isinstance(kind, str)]


def _by_document(rotary: Any, sequences: Sequences, x: Tensor, position_ids: Tensor, named: dict[str, str]) -> Any:
    layer_type = named.get("layer_type")
    rope_type = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
    if not depends_on_length(rope_type):
        return stock_class(rotary).forward(rotary, x, position_ids, **named)
    tokens = position_ids.shape[-1]
    position_ids = position_ids.expand(*position_ids.shape[:-2], sequences.total // tokens, tokens)
    lengths = _document_lengths(position_ids, sequences)
    if rope_type == "longrope":
        # two sets of frequencies: nothing to learn from the device
        parameters = rotary.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        bound = int(parameters["original_max_position_embeddings"])
        lengths = torch.where(lengths > bound, bound + 1, bound)
        distinct = [bound, bound + 1]
    else:
        lengths = lengths.clamp(min=int(rotary.original_max_seq_len))
        distinct = torch.unique_consecutive(lengths.flatten().sort().values).tolist()
    result = None
    for length in distinct:
        # the longest documents need no cut
        cut = position_ids if length == distinct[-1] else position_ids.clamp(max=length - 1)
        one = _as_if_of_length(rotary, x, cut, length, named)
        where = functools.partial(torch.where, (lengths == length)[..., None])
        result = one if result is None else tree_map(where, one, result)
    return result


def _document_lengths(position_ids: Tensor, sequences: Sequences) -> Tensor:
    """``[B, T]``: one more than the largest position of the token's document, which the stock module calls length."""
    rows = position_ids if position_ids.ndim == 2 else position_ids.amax(0)
    flat = rows.reshape(-1).long()
    document = (sequences.positions == 0).cumsum(0) - 1
    largest = torch.zeros_like(flat).scatter_reduce(0, document, flat, "amax")
    return (largest[document] + 1).view(rows.shape)


def _as_if_of_length(rotary: Any, x: Tensor, position_ids: Tensor, length: int, named: dict[str, str]) -> Any:
    """The stock forward for documents of one length; tokens of others get values that nobody reads.

    A last token at the largest position, cut off again, tells the stock module the length, of which none is beyond it.
    """
    last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
    told = torch.cat([position_ids, last], dim=-1)
    found = stock_class(rotary).forward(_at_first_state(rotary), x, told, **named)
    # strides that a graph sees must not tell how many lengths a batch holds
    return tree_map(lambda part: part[..., :-1, :].clone(memory_format=torch.contiguous_format), found)


def _at_first_state(rotary: Any) -> nn.Module:
    """A stock module as it was before any call, with buffers of its own: calls in other threads do not meet here."""
    stock = stock_class(rotary)
    fresh = stock.__new__(stock)
    fresh.__dict__.update({k: v for k, v in rotary.__dict__.items() if not k.endswith("_max_seq_len_cached")})
    fresh.__dict__["_buffers"] = dict(rotary._buffers)
    fresh.__dict__["max_seq_len_cached"] = rotary.original_max_seq_len
    for name, value in {**rotary.__dict__, **rotary._buffers}.items():
        if name.endswith("original_inv_freq"):
            fresh._buffers[name.replace("original_inv_freq", "inv_freq")] = value.clone()
    return fresh


def forget_lengths(text_model: Any) -> None:
    """Puts the rotary embeddings of a text model in their first state, as if no call had been."""
    for rotary in length_dependent_rotary(text_model):
        fresh = _at_first_state(rotary).__dict__
        for name in rotary.__dict__.keys() - fresh.keys():
            del rotary.__dict__[name]
        rotary.__dict__.update(fresh)
