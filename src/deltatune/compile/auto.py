"""``checkpointing="auto"``: decided at a training forward, when the tokens of a batch are known.

The graph of one layer of each type is traced and partitioned for every setting (nothing runs); what forward would hand
to backward, weights, gradients, optimizer and loss make the peak of a step. The least recomputation that fits is taken.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.compile.memory import (
    candidate_settings,
    choose_checkpointing,
    estimate_traced_memory,
    least_recomputation,
)
from deltatune.compile.trace import LayerMemory, Setting, trace_layer
from deltatune.hf import model as hf_model
from deltatune.state import AutoCheckpointing, Choice, State
from deltatune.subclass import stock_class

__all__ = ["decide_for", "deciding", "layer_label"]

_NOTHING_KEPT = LayerMemory(0, 0, 0)


_whole_model: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("deltatune_deciding", default=None)


@contextmanager
def deciding(model: Any, tokens: int) -> Iterator[None]:
    """Around the forward of a prepared model: decides where that is due, before the first layer runs.

    The outermost model counts, which is the one with the head.
    """
    state: State = model._deltatune
    auto = state.facts.auto
    due = auto is not None and model.training and torch.is_grad_enabled() and tokens > auto.tokens
    if not due or _whole_model.get() is not None:
        yield
        return
    token = _whole_model.set(model)
    try:
        if state.options.compile is None or state.options.compile.scope != "layer" or hf_model.is_sharded(model):
            _decide(state, tokens, _from_shapes(model, state, tokens, hf_model.device_of(model)))
            yield
            return

        def before_first_layer(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _whole_model.get() is model:  # not of another thread's call
                _decide(state, tokens, _from_graphs(model, state, tokens, args, kwargs))

        first = model.get_decoder().layers[0]
        handle = first.register_forward_pre_hook(before_first_layer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
    finally:
        _whole_model.reset(token)


def decide_for(model: Any, tokens: int, device: torch.device | None = None) -> None:
    """Decides for one row of so many tokens; the forward is left before its first layer.

    With ``device`` nothing runs: the shapes decide for a model that will train there.
    """
    if device is not None:
        state: State = model._deltatune
        _decide(state, tokens, _from_shapes(model, state, tokens, device))
        return

    def leave(*_: object) -> None:
        raise _LeftError

    first = model.get_decoder().layers[0]
    here = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.enable_grad(), deciding(model, tokens):
            # behind the hook that decides
            handle = first.register_forward_pre_hook(leave)
            try:
                model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=here))
            except _LeftError:
                pass
            finally:
                handle.remove()
    finally:
        for module, training in modes:
            module.training = training


class _LeftError(Exception):
    """Ends a forward before its first layer."""


def _decide(state: State, tokens: int, choice: Choice) -> None:
    assert state.facts.auto is not None
    state.facts.auto.tokens, state.facts.auto.choice = tokens, choice


def _from_shapes(model: Any, state: State, tokens: int, device: torch.device) -> Choice:
    assert state.facts.auto is not None
    return choose_checkpointing(
        model,
        tokens_per_batch=tokens,
        optimizer=state.facts.auto.optimizer,
        compiled=state.options.compile is not None,
        device=device,
        compute_dtype=state.facts.auto.compute_dtype,
    )


def _from_graphs(model: Any, state: State, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """``args`` and ``kwargs``: of the first layer's call."""
    assert state.facts.auto is not None
    settings = candidate_settings(compiled=True)
    accumulates = state.facts.auto.accumulates or any(parameter.grad is not None for parameter in model.parameters())
    layers = _layer_memories(model.get_decoder(), state, settings, args, kwargs)
    predicted = {
        setting: estimate_traced_memory(
            model,
            [memories[setting] for memories in layers],
            tokens_per_batch=tokens,
            optimizer=state.facts.auto.optimizer,
            compute_dtype=state.facts.auto.compute_dtype,
            accumulates=accumulates,
        ).total
        for setting in settings
    }
    return least_recomputation(predicted, hf_model.device_of(model))


def _layer_memories(
    decoder: Any, state: State, settings: tuple[Setting, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[dict[Setting, LayerMemory]]:
    """For every layer, in order, what it keeps at each setting; layers before all that trains keep nothing."""
    kwargs = dict(kwargs)
    hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
    trains = hidden.requires_grad
    leaf = hidden.detach().requires_grad_()
    traced: dict[str, dict[Setting, LayerMemory]] = {}
    found = []
    for layer in decoder.layers:
        trains = trains or any(parameter.requires_grad for parameter in layer.parameters())
        if not trains:
            found.append(dict.fromkeys(settings, _NOTHING_KEPT))
            continue
        label = layer_label(layer)
        if label not in traced:
            traced[label] = _traced(layer, state, settings, (leaf, *args[1:]), kwargs)
        found.append(traced[label])
    return found


def _traced(
    layer: nn.Module, state: State, settings: tuple[Setting, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Setting, LayerMemory]:
    """The layer as its graph will be."""
    with _autocast(args[0], state.facts.auto):
        return trace_layer(
            stock_class(layer).forward, layer, args, kwargs, settings=settings, options=state.options.compile
        )


def _autocast(like: Tensor, auto: AutoCheckpointing | None) -> Any:
    if auto is None or auto.compute_dtype is None or torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, dtype=auto.compute_dtype)


def layer_label(layer: nn.Module) -> str:
    """The type of a decoder layer: layers of one label share a graph."""
    kinds = (getattr(layer, name, None) for name in ("block_type", "layer_type", "attention_type"))
    kind = next((kind for kind in kinds if isinstance(kind, str)), None) or _configured_type(layer)
    mlp = getattr(layer, "mlp", None)
    return kind if mlp is None else f"{kind}_{stock_class(mlp).__name__}"


def _configured_type(layer: nn.Module) -> str:
    """The layer's entry in ``config.layer_types``: windows and full attention are different graphs."""
    attention = getattr(layer, "self_attn", None)
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    return str(types[index]) if types and index is not None and index < len(types) else "layer"
