"""The decoder layer and the text model around it: where a call is compiled, checkpointed or left to the stock path."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.compile import graphs_of
from deltatune.door import METADATA, admit
from deltatune.layers.capture import keep_capture_hooks_outside
from deltatune.layers.reclass import Swapped, stock_class
from deltatune.sequences import Sequences

__all__ = ["TWICE", "DecoderLayer", "Hidden", "TextModel", "catch_hidden", "is_cached_call"]

#: What is wrong with two kinds of checkpointing at once.
TWICE = (
    "the model checkpoints its layers the stock way and prepare(checkpointing=...) does too, so every layer would be "
    "recomputed twice; call model.gradient_checkpointing_disable() (gradient_checkpointing=False in a trainer's "
    "arguments), or leave checkpointing='none'"
)

#: Keyword arguments that no layer may see: they change from batch to batch and would be guarded on.
_NOT_FOR_LAYERS = frozenset({*METADATA, "num_items_in_batch", "labels", "shift_labels"})


class DecoderLayer(Swapped):
    """A decoder layer that runs compiled and checkpointed as ``prepare`` was asked to."""

    #: tells the types of layer of one model apart
    layer_type: str

    def forward(self, hidden_states: Tensor, *args: Any, sequences: Sequences | None = None, **kwargs: Any) -> Any:
        """As the stock layer; without ``sequences`` (a cached call) the stock forward, eager."""
        if sequences is None:
            return super().forward(hidden_states, *args, **kwargs)
        state, forward = self._deltatune, stock_class(self).forward
        if state.checkpointing != "none" and getattr(self, "gradient_checkpointing", False):
            raise ValueError(TWICE)
        kwargs["sequences"] = sequences
        if state.compile is not None and state.compile.scope == "layer":
            graphs = graphs_of(state, state.compile, state.checkpointing)
            return graphs.run(_label(self), forward, self, hidden_states, *args, **kwargs)
        if state.checkpointing == "layer" and self.training and torch.is_grad_enabled():
            return checkpoint(functools.partial(forward, self, **kwargs), hidden_states, *args, use_reentrant=False)
        return forward(self, hidden_states, *args, **kwargs)


def _label(layer: nn.Module) -> str:
    kinds = (getattr(layer, name, None) for name in ("block_type", "layer_type", "attention_type"))
    kind = next((kind for kind in kinds if isinstance(kind, str)), "layer")
    mlp = getattr(layer, "mlp", None)
    return kind if mlp is None else f"{kind}_{stock_class(mlp).__name__}"


class TextModel(Swapped):
    """The text model: resolves boundaries, keeps the stock model from building a mask, and feeds the layers."""

    config: Any
    get_input_embeddings: Callable[[], nn.Module]

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As the stock text model, with ``sequences`` and every other form of metadata the door admits."""
        if is_cached_call(self, kwargs):
            with _stock_path(self):
                return super().forward(input_ids=input_ids, **_without_sequences(kwargs))
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions is not available on a prepared model: no T x T weights are ever built")
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        rows, length = tokens.shape[:2]
        entry = admit(kwargs, rows=rows, tokens=length, device=tokens.device)
        call = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_LAYERS}
        call["attention_mask"] = self._no_mask(tokens.device)
        call["position_ids"] = entry.position_ids
        call["use_cache"] = False
        call["past_key_values"] = None
        call["sequences"] = entry.sequences.static()
        call["inputs_embeds"] = self._embeddings(input_ids, kwargs.get("inputs_embeds"))
        output = self._run(call)
        cell = _hidden.get()
        if cell is not None:
            cell.state, cell.sequences = output[0], entry.sequences
        return output

    def _run(self, call: dict[str, Any]) -> Any:
        state = self._deltatune
        if state.compile is None:
            return super().forward(**call)
        keep_capture_hooks_outside(self, call, state.compile.scope)
        if state.compile.scope == "layer":
            return super().forward(**call)
        graphs = graphs_of(state, state.compile, state.checkpointing)
        return graphs.run("text_model", stock_class(self).forward, self, **call)

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Token embeddings that require a gradient wherever one is taken.

        With a frozen embedding the first layer's input would need none, which is one more graph for its type.
        """
        embeddings: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()
        return embeddings

    def _no_mask(self, device: torch.device) -> Any:
        """What the stock text model takes as a finished mask; our attention reads boundaries instead."""
        if self._deltatune.mask_form == "mapping":
            return dict.fromkeys(self._deltatune.layer_types)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def is_cached_call(model: nn.Module, call: dict[str, Any]) -> bool:
    """Whether a call reads or fills a key-value cache, and so keeps the stock path whole.

    ``generate`` passes ``past_key_values``. A caller who asks for ``use_cache=True`` outside training gets the cache
    too, unless the call carries boundaries: a cache of packed documents would be of no use.
    """
    if call.get("past_key_values") is not None:
        return True
    if not call.get("use_cache") or model.training or any(call.get(name) is not None for name in METADATA):
        return False
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask > 1).any()):
        return False
    if not isinstance(positions, Tensor) or positions.shape[-1] < 2:
        return True
    text = positions[0] if positions.ndim == 3 else positions
    return bool((text[..., 1:] > text[..., :-1]).all()) or (isinstance(mask, Tensor) and not bool(mask.all()))


def _without_sequences(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "sequences"}


@contextmanager
def _stock_path(model: TextModel) -> Iterator[None]:
    state = model._deltatune
    before, state.cached = state.cached, True
    try:
        yield
    finally:
        state.cached = before


@dataclass
class Hidden:
    """What a text model's call leaves for the head: its last hidden state, and the boundaries it ran with."""

    state: Tensor | None = None
    sequences: Sequences | None = None


_hidden: contextvars.ContextVar[Hidden | None] = contextvars.ContextVar("deltatune_hidden", default=None)


@contextmanager
def catch_hidden() -> Iterator[Hidden]:
    """Catches the last hidden state of the text model called inside the block."""
    cell = Hidden()
    token = _hidden.set(cell)
    try:
        yield cell
    finally:
        _hidden.reset(token)
