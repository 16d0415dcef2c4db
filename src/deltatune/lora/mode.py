"""How a LoRA layer runs, and why: inside the base product, beside it, or as PEFT's own layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.hf.hooks import is_hooked

__all__ = ["BESIDE", "FUSED", "STOCK", "Form", "active_adapters", "form_of", "is_lora_linear"]

FUSED = "fused"
BESIDE = "beside"
STOCK = "stock"

_WIDTHS = (torch.bfloat16, torch.float16)
_DTYPES = (*_WIDTHS, torch.float32, torch.float64)


@dataclass(frozen=True)
class Form:
    """``FUSED``, ``BESIDE`` (products of its own, in the dtype of the input) or ``STOCK``, with the reason."""

    name: str
    reason: str


def is_lora_linear(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA layer over a linear one, exactly; quantised and other kinds are classes apart."""
    cls = type(module)
    return cls.__module__ == "peft.tuners.lora.layer" and cls.__qualname__ == "Linear"


def active_adapters(layer: Any) -> tuple[str, ...]:
    """Names of the adapters that act in a forward and have weights in this layer."""
    names = layer._active_adapter
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if name in layer.lora_A)


def form_of(layer: Any, setting: str, *, device: torch.device | None = None) -> Form:
    """The form of one of PEFT's LoRA layers, as it is now.

    Args:
        layer: the layer, swapped or not.
        setting: ``prepare``'s ``lora``.
        device: where the layer will run, for a report ahead of time on one without storage.
    """
    if setting == "stock":
        return Form(STOCK, "asked for")
    names = active_adapters(layer)
    reason = _stock_reason(layer, names, planned=device is not None)
    if reason is not None:
        return Form(STOCK, reason)
    weight, device = layer.base_layer.weight, device or layer.base_layer.weight.device
    if setting == "auto" and device.type == "cpu":
        return Form(STOCK, "on a CPU; lora='fused' folds adapters in there too")
    reason = _beside_reason(layer, names)
    if reason is not None:
        return Form(BESIDE, reason)
    if setting == "auto" and weight.dtype not in _WIDTHS:
        return Form(STOCK, f"the base weights are {_name(weight.dtype)}")
    return Form(FUSED, "one product for base and adapter")


def _stock_reason(layer: Any, names: tuple[str, ...], *, planned: bool) -> str | None:
    """What only PEFT's layer computes."""
    if not names:
        return "no active adapter"
    if layer.merged_adapters:
        return "merged into the base weight"
    variants = {type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant}
    if variants:
        return f"a variant of LoRA ({', '.join(sorted(variants))})"
    if any(layer.lora_bias.get(name, False) for name in names):
        return "lora_bias"
    if layer.fan_in_fan_out:
        return "the base weight is transposed (fan_in_fan_out)"
    base = getattr(layer.base_layer, "weight", None)
    if base is None:
        return f"the base layer, {type(layer.base_layer).__name__}, has no weight"
    if base.device.type == "meta" and not planned:
        return "the weights have no storage"
    for name in names:
        for module in (layer.lora_A[name], layer.lora_B[name]):
            reason = _adapter_reason(module, base)
            if reason is not None:
                return reason
    return None


def _adapter_reason(module: nn.Module, base: torch.Tensor) -> str | None:
    if type(module) is not nn.Linear:
        return f"an adapter is a {type(module).__name__}"
    if is_hooked(module):
        return "hooks on the adapters (offload, or a tool's own)"
    weight = module.weight
    if hasattr(weight, "ds_id"):
        return "partitioned by DeepSpeed ZeRO-3"
    if weight.dtype not in _DTYPES:
        return f"the adapters are {_name(weight.dtype)}"
    if weight.device != base.device:
        return f"the adapters are on {weight.device}, the base weight on {base.device}"
    return None


def _beside_reason(layer: Any, names: tuple[str, ...]) -> str | None:
    """Why a base weight cannot be bordered."""
    base = layer.base_layer
    weight = base.weight
    if any(getattr(layer.lora_dropout[name], "p", 0.0) > 0 for name in names):
        return "lora_dropout"
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    if getattr(base, "_is_fsdp_managed_module", False) or type(weight) is not nn.Parameter:
        return "the base weight is sharded"
    if weight.dtype not in _DTYPES:
        return f"the base weight is {_name(weight.dtype)}"
    if weight.requires_grad:
        return "the base weight trains"
    if is_hooked(base):
        return "hooks on the base layer (offload, or a tool's own)"
    if any(
        type(module.weight) is not nn.Parameter for name in names for module in (layer.lora_A[name], layer.lora_B[name])
    ):
        return "the adapters are sharded"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
