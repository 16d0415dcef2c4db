"""PEFT's LoRA layer with its adapters as part of the base product, and layers of that kind that share an input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.hf.cached import in_stock_path
from deltatune.hf.hooks import is_hooked
from deltatune.lora.merging import Merging
from deltatune.lora.mode import FUSED, STOCK, UNFUSED, active_adapters, mode_of
from deltatune.ops import Adapter, lora_gated
from deltatune.ops._lora_linear.api import linear_with_lora, low_rank
from deltatune.quantization.tensor import computes_in_fp8

__all__ = ["LoRALinear", "gated", "project", "without_bias"]


class LoRALinear(Merging):
    """``y = x W^T + s (x A^T) B^T``, as PEFT's LoRA layers; what it computes with is read from the layer at the call.

    Fused, base and adapters are one sum of products, for which a base in few bits is decoded; unfused, the base layer
    is called and the adapters' product is added in the dtype of the input (dropout; a base of another class, or that
    trains; shards that FSDP2 does not gather for the call); PEFT's own forward computes all else: merged or disabled
    adapters, variants, per-row adapters, cached calls.
    """

    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., K] -> [..., N]``."""
        mode = self.mode_of_call(x, *args, **kwargs)
        if mode == FUSED:
            return _fused(x, [self])[0]
        if mode == UNFUSED:
            return self._unfused(x)
        stock: Tensor = super().forward(x, *args, **kwargs)
        return stock

    def mode_of_call(self, x: Tensor, *args: Any, **kwargs: Any) -> str:
        """How this call runs."""
        if args or kwargs or in_stock_path(self):
            return STOCK
        return mode_of(self, self._deltatune.options.lora, dtype=_compute_dtype(x), called=True).name

    def adapters(self) -> list[Adapter]:
        """The active ones, as they are now."""
        peft: Any = self
        return [
            Adapter(peft.lora_A[name].weight, peft.lora_B[name].weight, peft.scaling[name])
            for name in active_adapters(self)
        ]

    def _merged_into(self) -> Iterator[tuple[Any, str]]:
        yield self.base_layer, "weight"

    def _unfused(self, x: Tensor) -> Tensor:
        peft: Any = self
        y: Tensor = self.base_layer(x)
        for name, adapter in zip(active_adapters(self), self.adapters(), strict=True):
            y = y + low_rank(_cast(peft.lora_dropout[name](x)), adapter).to(y.dtype)
        return y


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``layer(x)`` for each of them; those that are fused share the narrow product of ``x`` with all their adapters.

    Layers with hooks, without adapters or in another mode are simply called.
    """
    outputs: list[Tensor | None] = [None] * len(layers)
    joined = [place for place, layer in enumerate(layers) if _is_fused(layer, x)]
    if len(joined) > 1:
        products = _fused(x, [layers[place] for place in joined])
        for place, product in zip(joined, products, strict=True):
            outputs[place] = product
    return tuple(layer(x) if y is None else y for layer, y in zip(layers, outputs, strict=True))


def gated(x: Tensor, gate: nn.Module, up: nn.Module, activation: str, *, impl: str) -> Tensor | None:
    """``act(gate(x)) * up(x)`` as one op; None where they are not both fused, or one has a bias or computes in fp8.

    Args:
        x: ``[..., K]``.
        gate: to ``[..., N]``.
        up: to ``[..., N]``.
        activation: of ``ops.lora_gated``.
        impl: of the same.
    """
    layers: tuple[Any, Any] = gate, up
    if not (_is_fused(gate, x) and _is_fused(up, x) and without_bias(*layers)):
        return None
    weights, adapters = [layer.base_layer.weight for layer in layers], [layer.adapters() for layer in layers]
    if any(map(computes_in_fp8, weights)):
        return None
    return lora_gated(_cast(x), weights, adapters, activation=activation, impl=impl)


def without_bias(*layers: Any) -> bool:
    """Whether the base layers are products alone."""
    return all(layer.base_layer.bias is None for layer in layers)


def _is_fused(layer: nn.Module, x: Tensor) -> bool:
    return isinstance(layer, LoRALinear) and not is_hooked(layer) and layer.mode_of_call(x) == FUSED


def _fused(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    bases = [layer.base_layer for layer in layers]
    products = linear_with_lora(_cast(x), [base.weight for base in bases], [layer.adapters() for layer in layers])
    return [y if base.bias is None else y + base.bias.to(y.dtype) for y, base in zip(products, bases, strict=True)]


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(x: Tensor) -> Tensor:
    return x.to(_compute_dtype(x))
