"""How a LoRA layer runs, and why: as one product with its base, as its base and a product added, or as PEFT's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from deltatune.hf.hooks import is_hooked
from deltatune.hf.model import is_sharded
from deltatune.quantization.tensor import QuantizedTensor

__all__ = ["FUSED", "STOCK", "UNFUSED", "Mode", "active_adapters", "is_lora_linear", "is_read_whole", "mode_of"]

FUSED = "fused"
UNFUSED = "unfused"
STOCK = "stock"

_NARROW = (torch.bfloat16, torch.float16)
_DTYPES = (*_NARROW, torch.float32, torch.float64)
#: Weights that a product reads as they are; those in few bits are decoded for it.
_WHOLE = (nn.Parameter, QuantizedTensor)
#: Bases whose LoRA layers compute something else than a base's output and a low-rank product of the same input.
_OTHER_BASES = (nn.Embedding, nn.MultiheadAttention, nn.modules.conv._ConvNd)


class Mode(NamedTuple):
    """``FUSED``, ``UNFUSED`` (the base layer is called, the product added in the dtype of the input) or ``STOCK``."""

    name: str
    reason: str


#: Made once, where a call would make the compiler trace how.
_ONE_PRODUCT = Mode(FUSED, "one product for base and adapter")


def is_lora_linear(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers that add low-rank products of their input to a base's output.

    Those over quantised bases are classes apart with the same arithmetic; so is what adapts a linear layer's weight by
    its name. Not what adapts another Parameter.
    """
    if not type(module).__module__.startswith("peft.tuners.lora."):
        return False
    parts = module._modules
    return (
        {"base_layer", "lora_A", "lora_B", "lora_dropout"} <= parts.keys()
        and not isinstance(parts["base_layer"], _OTHER_BASES)
        and (getattr(module, "parameter_name", None) is None or _adapts_linear(module))
    )


def _adapts_linear(wrapper: Any) -> bool:
    return wrapper.parameter_name == "weight" and type(wrapper.base_layer) is nn.Linear


def active_adapters(layer: Any) -> tuple[str, ...]:
    """Names of the adapters that act in a forward and have weights in this layer."""
    names, known = layer._active_adapter, layer.lora_A._modules
    names = (names,) if isinstance(names, str) else names
    return tuple([name for name in names if name in known])


def mode_of(
    layer: Any,
    setting: str,
    *,
    dtype: torch.dtype | None = None,
    gathered_in: torch.dtype | None = None,
    device: torch.device | None = None,
    called: bool = False,
) -> Mode:
    """The mode of one of PEFT's LoRA layers, from what it is now; called by the layer itself and by the report.

    Args:
        layer: the layer, swapped or not.
        setting: ``prepare``'s ``lora``.
        dtype: what a call computes in; the base weight's own by default.
        gathered_in: the dtype of the weights that a call will get, where that is not their own.
        device: where the layer will run, for a report ahead of time on one without storage.
        called: in a call, before which FSDP2 gathers the weights that it shards; else they are taken as gathered.
    """
    if setting == "stock":
        return Mode(STOCK, "asked for")
    names = active_adapters(layer)
    linears = [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
    reason = _stock_reason(layer, names, linears, planned=device is not None)
    if reason is not None:
        return Mode(STOCK, reason)
    # PEFT's own forward where it adds a product too; around a weight that it adapts by name it does not
    plain = UNFUSED if hasattr(layer, "parameter_name") else STOCK
    if setting == "auto" and (device or linears[0].weight.device).type == "cpu":
        return Mode(plain, "on a CPU; lora fused (lora.impl in a recipe) makes adapters part of the products there too")
    reason = _unfused_reason(layer, names, linears, called=called)
    if reason is not None:
        return Mode(UNFUSED, reason)
    read = gathered_in or layer.base_layer.weight.dtype
    if setting == "auto" and read not in _NARROW:
        return Mode(plain, f"the base weights are {_name(read)}")
    if dtype is not None and dtype != read:
        return Mode(plain, f"autocast to {_name(dtype)} casts the base weights, {_name(read)}, in every call")
    return _ONE_PRODUCT


def _stock_reason(layer: Any, names: tuple[str, ...], linears: list[Any], *, planned: bool) -> str | None:
    """What only PEFT's layer computes."""
    if not names:
        return "no active adapter"
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "merged into the base weight"
    for name in names:
        if name in layer.lora_variant:
            return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
        if layer.lora_bias.get(name, False):
            return "lora_bias"
    if getattr(layer, "fan_in_fan_out", False):
        return "the base weight is transposed (fan_in_fan_out)"
    base = getattr(layer.base_layer, "weight", None)
    if base is not None and base.device.type == "meta" and not planned:
        return "the weights have no storage"
    for linear in linears:
        reason = _adapter_reason(linear, base)
        if reason is not None:
            return reason
    return None


def _adapter_reason(module: nn.Module, base: torch.Tensor | None) -> str | None:
    if type(module) is not nn.Linear:
        return f"an adapter is a {type(module).__name__}"
    if is_hooked(module):
        return "hooks on the adapters (offload, or a tool's own)"
    weight = module.weight
    if hasattr(weight, "ds_id"):
        return "partitioned by DeepSpeed ZeRO-3"
    if weight.dtype not in _DTYPES:
        return f"the adapters are {_name(weight.dtype)}"
    if base is not None and weight.device != base.device:
        return f"the adapters are on {weight.device}, the base weight on {base.device}"
    return None


def _unfused_reason(layer: Any, names: tuple[str, ...], linears: list[Any], *, called: bool) -> str | None:
    """Why the base layer is called."""
    base = layer.base_layer
    for name in names:
        dropout = layer.lora_dropout[name]
        if is_hooked(dropout):
            return "hooks on lora_dropout"
        if type(dropout) is not nn.Identity:
            return "lora_dropout"
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    if is_hooked(base):
        return "hooks on the base layer (offload, or a tool's own)"
    weight = base.weight
    if not is_read_whole(base, called=called):
        shards = is_sharded(weight) or type(weight) in _WHOLE
        return "the base weight is sharded" if shards else f"the base weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"the base weight is {_name(weight.dtype)}"
    if weight.requires_grad:
        return "the base weight trains"
    if not all(is_read_whole(linear, called=called) for linear in linears):
        return "the adapters are sharded"
    return None


def is_read_whole(linear: Any, *, called: bool) -> bool:
    """Whether a call reads a Parameter that is no shard.

    Outside of calls FSDP2's may be a DTensor, FSDP1's a part of a flat one, which has one dimension.
    """
    plain = type(linear.weight) in _WHOLE
    if called or not getattr(linear, "_is_fsdp_managed_module", False):
        return plain
    return linear.weight.ndim > 1 if plain else is_sharded(linear.weight)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
