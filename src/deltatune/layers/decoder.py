"""The decoder layer and the text model around it: where a call is compiled, checkpointed or left to the stock path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from deltatune.compile.auto import deciding, layer_label
from deltatune.compile.graphs import FROZEN, compile_options, graphs_of, of_kind
from deltatune.cost import Cost
from deltatune.hf import attention_interface
from deltatune.hf.cached import check_boundaries, is_cached_call, packed_call, stock_path
from deltatune.hf.capture import keep_capture_hooks_outside
from deltatune.hf.experts import has_divided_experts
from deltatune.hf.forwards import replaced_since
from deltatune.hf.peft import refuse_virtual_tokens
from deltatune.layers.attention import attention_cost, attention_spec
from deltatune.layers.exchange import exchange
from deltatune.layers.router import Router, has_router, recorded_routers, recording, run_recorded
from deltatune.layers.state_passing import state_before, tokens_before
from deltatune.ops import Spec
from deltatune.packing.group import Recurrent, SequenceGroup
from deltatune.packing.metadata import METADATA, Resolved, resolve_metadata
from deltatune.packing.sequences import Sequences
from deltatune.state import bound
from deltatune.subclass import Swapped, stock_class

__all__ = ["DOUBLE_CHECKPOINTING", "DecoderLayer", "TextModel", "catch_hidden", "resolved_call"]

#: What is wrong with two kinds of checkpointing at once.
DOUBLE_CHECKPOINTING = (
    "the model checkpoints its layers the stock way and prepare(checkpointing=...) does too, so every layer would be "
    "recomputed twice; call model.gradient_checkpointing_disable() (gradient_checkpointing=False in a trainer's "
    "arguments), or leave checkpointing='none'"
)

#: Keyword arguments that no layer may see: they change from batch to batch and would be guarded on.
_NOT_FOR_LAYERS = frozenset({*METADATA, "num_items_in_batch", "labels", "shift_labels"})


class DecoderLayer(Swapped):
    """A decoder layer that runs compiled and checkpointed as ``prepare`` was asked to."""

    def forward(self, hidden_states: Tensor, *args: Any, sequences: Sequences | None = None, **kwargs: Any) -> Any:
        """As the stock layer; without ``sequences`` (a cached call) the stock forward, eager.

        Layers before the first thing that trains have graphs of their own, without a backward unless something that
        trains is found while they are traced: a buffer, what a function closes over.
        """
        check_boundaries(self, sequences)
        if sequences is None:
            return super().forward(hidden_states, *args, **kwargs)
        state, forward = self._deltatune, stock_class(self).forward
        options = compile_options(state)
        if state.checkpointing != "none" and getattr(self, "gradient_checkpointing", False):
            raise ValueError(DOUBLE_CHECKPOINTING)
        kwargs["sequences"] = sequences
        if options is not None and options.scope == "layer" and not torch.compiler.is_compiling():
            if torch.is_grad_enabled() and not hidden_states.requires_grad:
                if not _brings_gradients(self, (args, kwargs)):
                    label = layer_label(self) + FROZEN
                    return run_recorded(graphs_of(state).run, label, forward, self, hidden_states, *args, **kwargs)
                # the first layer that trains takes the graph of those behind it, whose inputs have a gradient
                hidden_states = hidden_states.detach().requires_grad_()
            label = layer_label(self)
            return run_recorded(graphs_of(state).run, label, forward, self, hidden_states, *args, **kwargs)
        if state.checkpointing == "layer" and self.training and torch.is_grad_enabled():
            called = functools.partial(forward, self, **kwargs)
            return checkpoint(called, hidden_states, *args, use_reentrant=False, **_contexts(self))
        return forward(self, hidden_states, *args, **kwargs)

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of stock attention, which calls the op through transformers' attention interface."""
        attention = getattr(module, "self_attn", None)
        return () if attention is None else (attention_spec(attention, device, dtype),)

    def cost(self, tokens: int, squares: int, *, recurrent: Recurrent = "heads") -> Cost:
        """Of stock attention, which has no layer class of ours; nothing where every part of the layer has its own."""
        del recurrent
        attention: Any = getattr(self, "self_attn", None)
        if attention is None or isinstance(attention, Swapped):
            return Cost()
        return attention_cost(attention.config, tokens, squares)


#: The ops that other ranks take part in.
_EXCHANGED = [exchange, state_before, tokens_before]


def _contexts(layer: DecoderLayer) -> dict[str, Any]:
    """What a layer checkpointed by itself keeps besides its input; in a graph the partitioner knows."""
    exchanges = layer._deltatune.sequence is not None or has_divided_experts(layer)
    if torch.compiler.is_compiling() or not exchanges:
        return {}
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _EXCHANGED)}


def _brings_gradients(layer: nn.Module, given: object) -> bool:
    """Whether a gradient may begin in a layer whose input has none.

    In what trains or in a tensor that the call brings; what a hook inside adds is found while its graph is traced.
    """
    return any(parameter.requires_grad for parameter in layer.parameters()) or any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(given)
    )


class TextModel(Swapped):
    """The text model: resolves boundaries, keeps the stock model from building a mask, and feeds the layers."""

    whole_model = True
    extra_arguments = ("sequences",)

    config: Any
    layers: nn.ModuleList
    get_input_embeddings: Callable[[], nn.Module]

    def _forward(self, given: dict[str, Any]) -> Any:
        """As the stock text model, with ``sequences`` and every other form of packing metadata."""
        if is_cached_call(self, given):
            with stock_path(self):
                return super().forward(**given)
        if given.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions is not available on a prepared model: no T x T weights are ever built")
        replaced = self._replaced()
        resolved = resolved_call(given, self._deltatune.sequence)
        sequences = resolved.of_layers
        call = {name: value for name, value in given.items() if name not in _NOT_FOR_LAYERS}
        call["attention_mask"] = self._no_mask(sequences.cu_seqlens.device)
        call["position_ids"] = resolved.position_ids
        call["use_cache"] = False
        call["past_key_values"] = None
        call["sequences"] = sequences.static()
        if call.get("inputs_embeds") is None:
            call["inputs_embeds"] = self.get_input_embeddings()(call["input_ids"])
        call["input_ids"] = None
        apart = of_kind("whole documents") if resolved.whole else nullcontext()
        with deciding(self, resolved.tokens), packed_call(self._deltatune, sequences, replaced), apart:
            return self._run(call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss reads the last hidden state as hooks and wrappers around the forward leave it."""
        output = super().__call__(*args, **kwargs)
        caught = _hidden.get(None)
        if caught is not None:
            caught.append(output[0])
        return output

    def _replaced(self) -> dict[nn.Module, str]:
        """Modules of ours with a forward that was put on them since prepare, and by whom; outside every graph.

        Raises:
            ValueError: a layer, or attention in it, that is not as prepared.
        """
        found: dict[nn.Module, str] = {}
        shared = self.config if attention_interface.is_prepared(self) else None
        for index, layer in enumerate(self.layers):
            modules = [layer, *_below(layer)]
            # further down, inside wrappers
            part = self._unprepared(modules, shared) and self._unprepared(list(layer.modules()), shared)
            if part:
                raise ValueError(
                    f"{part} of layer {index}: it, or the attention that its config names, was set after prepare and "
                    "keeps documents together; call prepare(model) again"
                )
            for module in modules:
                ours = isinstance(module, Swapped) and (module is layer or module.replaces_forward)
                if ours and (put := replaced_since(cast("Swapped", module))) is not None:
                    name = stock_class(module).__name__
                    found[module] = f"{name} of layer {index}: its forward was replaced after prepare, by {put}"
        return found

    def _unprepared(self, modules: Iterable[nn.Module], shared: Any) -> str | None:
        """The part of a layer and its modules that would not keep documents apart, if there is one."""
        ours = [part for part in modules if isinstance(part, Swapped) and part._deltatune is self._deltatune]
        if not any(isinstance(part, DecoderLayer) for part in ours):
            return "the decoder layer"
        if not self._deltatune.options.interface:
            mixing = (part for part in ours if part._takes_sequences and not isinstance(part, DecoderLayer))
            return "attention" if next(mixing, None) is None else None
        own = (part for part in modules if part.__dict__.get("config", shared) is not shared)
        return next((type(part).__name__ for part in own if not attention_interface.is_prepared(part)), None)

    def _run(self, call: dict[str, Any]) -> Any:
        options = compile_options(self._deltatune)
        if options is None or torch.compiler.is_compiling():
            return super().forward(**call)
        self._check_adapters()
        wants_logits = keep_capture_hooks_outside(self, call, options.scope, routers=lambda: has_router(self))
        if options.scope == "layer":
            graphs = graphs_of(self._deltatune)
            graphs.expected = graphs.expected or len({layer_label(layer) for layer in self.layers})
            if not wants_logits:
                return super().forward(**call)
            if not all(isinstance(router, Router) for router in recorded_routers(self)):
                raise ValueError(
                    "a router was replaced after prepare, and its logits would be lost; call prepare(model) again"
                )
            as_tuple = call.pop("return_dict", getattr(self.config, "return_dict", True)) is False
            with recording() as logits:
                output = super().forward(**call, return_dict=True)
            output["router_logits"] = tuple(logits)
            return output.to_tuple() if as_tuple else output
        return graphs_of(self._deltatune).run("text_model", stock_class(self).forward, self, **call)

    def _check_adapters(self) -> None:
        """Refuses what PEFT put around Parameters since prepare: its forward parametrizes, which no graph can hold."""
        if self._deltatune.options.lora == "stock":
            return
        for index, layer in enumerate(self.layers):
            inside = set()  # of several wrappers around one module the outermost is ours
            for module in _below(layer):
                if "parameter_name" not in module.__dict__:
                    continue
                inside.add(module._modules["base_layer"])
                if module not in inside and not isinstance(module, Swapped):
                    raise ValueError(
                        f"adapters of {module.__dict__['parameter_name']} of layer {index} were added after prepare, "
                        "and PEFT's own forward of them breaks a graph; call prepare(model) again"
                    )

    def _no_mask(self, device: torch.device) -> Any:
        """What the stock text model takes as a finished mask; our attention reads boundaries instead."""
        if self._deltatune.options.mask_form == "mapping":
            return dict.fromkeys(getattr(self.config, "layer_types", None) or ("full_attention",))
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _below(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer's modules and theirs: attention, delta rule and experts lie no deeper."""
    for child in layer._modules.values():
        if child is not None:
            yield child
            yield from (module for module in child._modules.values() if module is not None)


def resolved_call(call: Mapping[str, Any], group: SequenceGroup | None) -> Resolved:
    """What the arguments of a model say of documents; with ``group`` the call holds this rank's part of a pack.

    Raises:
        ValueError: no tokens or two kinds of them, PEFT's virtual tokens, or what ``resolve_metadata`` refuses.
    """
    if call.get("inputs_embeds") is not None:
        refuse_virtual_tokens()
    given = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
    if len(given) != 1:
        raise ValueError("pass exactly one of input_ids [B, T] and inputs_embeds [B, T, E]")
    rows, tokens = given[0].shape[:2]
    return resolve_metadata(call, rows=rows, tokens=tokens, device=given[0].device, group=group)


_hidden: ContextVar[list[Tensor]] = ContextVar("deltatune_hidden")


def catch_hidden() -> AbstractContextManager[list[Tensor]]:
    """A list that gets the last hidden state of each text model called inside the block."""
    return bound(_hidden, [])
