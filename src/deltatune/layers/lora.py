"""LoRA in a prepared model: which layers are swapped, which share an input, when they are brought in step, and a count.

Eager layers bring themselves in step when they are called. A compiled graph cannot, so hooks in front of decoder layers
(of the text model, where that is one graph) do it for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltatune.compile.graphs import compile_options
from deltatune.hf.cached import in_stock_path
from deltatune.layers.mlp import GatedMLP, is_gated_mlp
from deltatune.lora.group import LoraGroup
from deltatune.lora.linear import LoRALinear
from deltatune.lora.mode import FUSED, STOCK, Form, form_of, is_lora_linear
from deltatune.state import State
from deltatune.subclass import swap

__all__ = ["check_all_fused", "forget_lora", "install_lora", "lora_forms", "release_lora"]

#: Where a decoder layer keeps the groups under it.
_GROUPS = "_lora_groups"


def check_all_fused(base: nn.Module, text_model: Any) -> None:
    """Checks what ``lora="fused"`` asks for.

    Raises:
        ValueError: there is nothing to fuse, or a layer that cannot be.
    """
    forms = lora_forms(base, text_model, "fused", torch.device("cpu"))
    if not forms:
        raise ValueError("lora='fused' needs LoRA layers, and the model has none; add adapters before prepare")
    for path, form in forms:
        if form.name != FUSED:
            raise ValueError(
                f"lora='fused' cannot run {path}: {form.reason}; change that, or use lora='auto', which runs such "
                "layers beside the base product or as PEFT's own"
            )


def install_lora(text_model: Any, state: State) -> None:
    """Swaps the LoRA layers of the decoder layers, and the MLPs around them."""
    if state.options.lora == "stock":
        return
    for layer in text_model.layers:
        modules = list(layer.modules())
        if not any(map(is_lora_linear, modules)):
            continue
        for module in modules:
            if is_lora_linear(module):
                swap(module, LoRALinear, state)
            elif is_gated_mlp(module):
                swap(module, GatedMLP, state)
        groups = [group for module in modules for group in _groups_among_children(module, state.options.lora)]
        layer.__dict__[_GROUPS] = tuple(groups)
        layer.register_forward_pre_hook(_before_layer)
    if any(_GROUPS in layer.__dict__ for layer in text_model.layers):
        text_model.register_forward_pre_hook(_before_text_model)


def forget_lora(text_model: Any) -> None:
    """Gives the weights back and takes the hooks off; ``restore`` undoes the rest."""
    for module in (*text_model.layers, text_model):
        for group in module.__dict__.pop(_GROUPS, ()):
            group.release()
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (_before_layer, _before_text_model):
                del module._forward_pre_hooks[key]


def release_lora(text_model: Any) -> None:
    """Gives every bordered weight back as a plain contiguous tensor; the next call takes them in again."""
    for layer in text_model.layers:
        for group in layer.__dict__.get(_GROUPS, ()):
            group.release()


def lora_forms(model: nn.Module, text_model: Any, setting: str, device: torch.device) -> list[tuple[str, Form]]:
    """Every layer with adapters under ``model``, by path, and how it runs; without storage yet, on ``device``."""
    inside = {id(module) for layer in text_model.layers for module in layer.modules()}
    found = []
    for path, module in model.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
            continue
        if not is_lora_linear(module):
            form = Form(STOCK, f"{type(module).__name__}, another kind of layer")
        elif id(module) not in inside:
            form = Form(STOCK, "outside the decoder layers")
        else:
            weight = getattr(module.base_layer, "weight", None)
            without_storage = weight is not None and weight.device.type == "meta"
            form = form_of(module, setting, device=device if without_storage else None)
        found.append((path, form))
    return found


def _groups_among_children(parent: nn.Module, setting: str) -> Iterator[LoraGroup]:
    children = {name: child for name, child in parent.named_children() if isinstance(child, LoRALinear)}
    for names in getattr(type(parent), "shared_inputs", ()):
        members = [children.pop(name) for name in names if name in children]
        if members:
            yield LoraGroup(members, setting, pointwise_gradients=getattr(type(parent), "pointwise_gradients", False))
    gated = getattr(type(parent), "gated_inputs", ())
    for name, child in children.items():
        yield LoraGroup([child], setting, gated_input=name in gated)


def _before_layer(layer: Any, _: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling() and not in_stock_path(layer) and _is_compiled(layer._deltatune, "layer"):
        for group in layer.__dict__[_GROUPS]:
            group.sync()


def _before_text_model(text_model: Any, _: tuple[Any, ...]) -> None:
    if (
        not torch.compiler.is_compiling()
        and not in_stock_path(text_model)
        and _is_compiled(text_model._deltatune, "model")
    ):
        for layer in text_model.layers:
            for group in layer.__dict__.get(_GROUPS, ()):
                group.sync()


def _is_compiled(state: State, scope: str) -> bool:
    options = compile_options(state)
    return options is not None and options.scope == scope
