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
from deltatune.packing.sequences import Sequences
from deltatune.state import AutoCheckpointing, State, bound
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
    due = model.training and torch.is_grad_enabled() and _whole_model.get() is None
    if auto is None or not due or tokens <= auto.tokens:
        yield
        return

    def before_first_layer(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _whole_model.get() is model:  # not of another thread's call
            _decide(model, tokens, _from_graphs(model, auto, tokens, args, kwargs))

    with bound(_whole_model, model):
        if state.options.compile is None or state.options.compile.scope != "layer" or hf_model.is_sharded(model):
            _decide(model, tokens, _from_shapes(model, auto, tokens))
            yield
            return
        with model.get_decoder().layers[0].register_forward_pre_hook(before_first_layer, with_kwargs=True):
            yield


def decide_for(model: Any, tokens: int, device: torch.device | None = None) -> None:
    """Decides for one row of so many tokens, of a rank in a sequence group; the forward ends before its first layer.

    With ``device`` nothing runs: the shapes decide for a model that will train there.
    """
    if device is not None:
        _decide(model, tokens, _from_shapes(model, model._deltatune.facts.auto, tokens), device)
        return

    def leave(*_: object) -> None:
        raise _LeftError

    first = model.get_decoder().layers[0]
    here = next(model.parameters()).device
    call = {"input_ids": torch.zeros(1, tokens, dtype=torch.long, device=here)}
    group = model._deltatune.sequence
    described = {} if group is None else {"sequences": Sequences.from_lengths([group.size * tokens], device=here)}
    # the hook that leaves is behind the one that decides
    with (
        hf_model.in_mode(model, training=True),
        torch.enable_grad(),
        deciding(model, tokens),
        first.register_forward_pre_hook(leave),
        suppress(_LeftError),
    ):
        model(**call, **described)


class _LeftError(Exception):
    """Ends a forward before its first layer."""


def _decide(model: Any, tokens: int, predicted: dict[Setting, int], device: torch.device | None = None) -> None:
    auto = model._deltatune.facts.auto
    auto.tokens, auto.choice = tokens, least_recomputation(predicted, device or hf_model.device_of(model))


def _from_shapes(model: Any, auto: AutoCheckpointing, tokens: int) -> dict[Setting, int]:
    """Peaks of a model that has no storage yet, is sharded, or is not compiled layer by layer."""
    group = model._deltatune.sequence
    sequence, recurrent = (auto.sequence, auto.recurrent) if group is None else (group.size, group.recurrent)
    return {
        setting: estimate_memory(
            model,
            tokens_per_batch=tokens,
            optimizer=auto.optimizer,
            checkpointing=setting,
            compute_dtype=auto.compute_dtype,
            shard=auto.shard,
            sequence=sequence,
            recurrent=recurrent,
            experts=auto.experts,
        ).total
        for setting in candidate_settings(compiled=model._deltatune.options.compile is not None)
    }


def _from_graphs(
    model: Any, auto: AutoCheckpointing, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Setting, int]:
    """``args`` and ``kwargs``: of the first layer's call."""
    settings = candidate_settings(compiled=True)
    with _autocast(hf_model.device_of(model), auto.compute_dtype):
        layers = _layer_memories(model.get_decoder(), settings, args, kwargs)
    return {
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


def _layer_memories(
    decoder: Any, settings: tuple[Setting, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
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
                forward, layer, (leaf, *args[1:]), kwargs, settings=settings, options=decoder._deltatune.options.compile
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
