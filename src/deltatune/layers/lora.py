"""LoRA in a prepared model: which layers are swapped, and how each of them runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.hf.forwards import runs_own_forward
from deltatune.layers.mlp import GatedMLP, is_gated_mlp
from deltatune.lora.linear import LoRALinear
from deltatune.lora.mode import FUSED, STOCK, Mode, is_lora_linear, mode_of
from deltatune.lora.parameters import LoRAParameters, is_parameter_lora, parameters_mode
from deltatune.state import Facts, State
from deltatune.subclass import swap

__all__ = ["check_all_fused", "install_lora", "lora_modes"]


def check_all_fused(base: nn.Module, text_model: Any) -> None:
    """Checks what ``lora="fused"`` asks for.

    Raises:
        ValueError: there is nothing to fuse, or a layer that cannot be.
    """
    modes = lora_modes(base, text_model, "fused", torch.device("cpu"))
    if not modes:
        raise ValueError("lora='fused' needs LoRA layers, and the model has none; add adapters before prepare")
    for path, mode in modes:
        if mode.name != FUSED:
            raise ValueError(
                f"lora='fused' cannot run {path}: {mode.reason}; change that, or use lora='auto', which calls the base "
                "layer and adds the adapter's product, or leaves the layer to PEFT"
            )


def install_lora(text_model: Any, state: State) -> None:
    """Swaps the LoRA layers of the decoder layers, and the MLPs around them; ``restore`` undoes it."""
    if state.options.lora == "stock":
        return
    for layer in text_model.layers:
        modules = list(layer.modules())
        adapted = any(map(is_lora_linear, modules))
        wrapped = {module.base_layer for module in modules if is_parameter_lora(module)}
        # others are called as they are, which is right for whatever another tool put there
        for module in filter(runs_own_forward, modules):
            if is_lora_linear(module):
                swap(module, LoRALinear, state)
            elif is_parameter_lora(module) and module not in wrapped:
                swap(module, LoRAParameters, state)
            elif adapted and is_gated_mlp(module):
                swap(module, GatedMLP, state)


def lora_modes(
    model: nn.Module, text_model: Any, setting: str, device: torch.device, facts: Facts | None = None
) -> list[tuple[str, Mode]]:
    """Every layer with adapters under ``model``, by path, and how it runs; without storage yet, on ``device``."""
    precision = None if facts is None else facts.precision
    dtype = None if precision is None else precision.dtype
    gathered_in = None if facts is None else facts.gathered_in
    inside = {id(module) for layer in text_model.layers for module in layer.modules()}
    # of several wrappers around one module the outermost says how they run
    wrapped = {id(module.base_layer) for module in model.modules() if is_parameter_lora(module)}
    found = []
    for path, module in model.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
            continue
        if id(module) not in inside and (is_lora_linear(module) or is_parameter_lora(module)):
            mode = Mode(STOCK, "outside the decoder layers")
        elif is_parameter_lora(module):
            if id(module) in wrapped:
                continue
            mode = parameters_mode(module, setting)
        elif not is_lora_linear(module):
            mode = Mode(STOCK, f"{type(module).__name__}, another kind of layer")
        else:
            weight = getattr(module.base_layer, "weight", None)
            without_storage = weight is not None and weight.device.type == "meta"
            planned = device if without_storage else None
            mode = mode_of(module, setting, dtype=dtype, gathered_in=gathered_in, device=planned)
        found.append((path, mode))
    return found
