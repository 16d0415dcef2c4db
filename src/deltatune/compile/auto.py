"""``checkpointing="auto"``: decided at a training forward, when the tokens of a batch are known.

The graph of one layer of each type is traced and partitioned for every setting (nothing runs); what forward would hand
to backward, weights, gradients, optimizer and loss make the peak of a step. The least recomputation that fits is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.compile.memory import candidate_settings, estimate_memory, estimate_traced_memory, least_recomputation
from deltatune.compile.trace import LayerMemory, Setting, trace_layer
from deltatune.hf import model as hf_model
from deltatune.state import Choice, State, bound
from deltatune.subclass import stock_class

__all__ = ["decide_for", "deciding", "layer_label"]

_whole_model: ContextVar[nn.Module | None] = ContextVar("deltatune_deciding", default=None)


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

    def before_first_layer(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _whole_model.get() is model:  # not of another thread's call
            _decide(state, tokens, _from_graphs(model, state, tokens, args, kwargs))

    with bound(_whole_model, model):
        if state.options.compile is None or state.options.compile.scope != "layer" or hf_model.is_sharded(model):
            _decide(state, tokens, _from_shapes(model, state, tokens, hf_model.device_of(model)))
            yield
            return
        with model.get_decoder().layers[0].register_forward_pre_hook(before_first_layer, with_kwargs=True):
            yield


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
    # the hook that leaves is behind the one that decides
    with (
        hf_model.in_mode(model, training=True),
        torch.enable_grad(),
        deciding(model, tokens),
        first.register_forward_pre_hook(leave),
        suppress(_LeftError),
    ):
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=here))


class _LeftError(Exception):
    """Ends a forward before its first layer."""


def _decide(state: State, tokens: int, choice: Choice) -> None:
    assert state.facts.auto is not None
    state.facts.auto.tokens, state.facts.auto.choice = tokens, choice


def _from_shapes(model: Any, state: State, tokens: int, device: torch.device) -> Choice:
    """For a model that has no storage yet, is sharded, or is not compiled layer by layer."""
    auto = state.facts.auto
    assert auto is not None
    predicted = {
        setting: estimate_memory(
            model,
            tokens_per_batch=tokens,
            optimizer=auto.optimizer,
            checkpointing=setting,
            compute_dtype=auto.compute_dtype,
        ).total
        for setting in candidate_settings(compiled=state.options.compile is not None)
    }
    return least_recomputation(predicted, device)


def _from_graphs(model: Any, state: State, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """``args`` and ``kwargs``: of the first layer's call."""
    auto = state.facts.auto
    assert auto is not None
    settings = candidate_settings(compiled=True)
    with _autocast(hf_model.device_of(model), auto.compute_dtype):
        layers = _layer_memories(model.get_decoder(), state, settings, args, kwargs)
    predicted = {
        setting: estimate_traced_memory(
            model,
            [memories[setting] for memories in layers],
            tokens_per_batch=tokens,
            optimizer=auto.optimizer,
            compute_dtype=auto.compute_dtype,
            accumulates=auto.accumulates or any(parameter.grad is not None for parameter in model.parameters()),
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
            found.append(dict.fromkeys(settings, LayerMemory(0, 0, 0)))
            continue
        label = layer_label(layer)
        if label not in traced:
            forward = stock_class(layer).forward
            traced[label] = trace_layer(
                forward, layer, (leaf, *args[1:]), kwargs, settings=settings, options=state.options.compile
            )
        found.append(traced[label])
    return found


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """As training will run, where that is not so already."""
    enabled = dtype is not None and not torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype=dtype) if enabled else nullcontext()


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
