"""PEFT's LoRA layer with its adapters inside the base product, and layers of that kind that share an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.hf.cached import in_stock_path
from deltatune.hf.hooks import is_hooked
from deltatune.lora.group import LoraGroup
from deltatune.lora.mode import BESIDE, FUSED, STOCK, active_adapters
from deltatune.ops._lora_linear.gated_act import gated_act_runs
from deltatune.ops._lora_linear.low_rank import low_rank
from deltatune.subclass import Swapped

__all__ = ["LoRALinear", "project"]

#: Plain attributes that a copy makes again and ``revert()`` takes away.
_OWN = ("_lora_form", "_lora_number", "_lora_group")


class LoRALinear(Swapped):
    """``y = x W^T + s (x A^T) B^T``, as ``peft.tuners.lora.layer.Linear``.

    Fused, it is one product forward and one backward; beside its base layer (dropout, a sharded, quantised or trained
    base weight), two narrow products in the dtype of the input; and PEFT's own forward for all else: merged or disabled
    adapters, variants, per-row adapters, cached calls. PEFT's methods act as they do there: merging gives the base
    weight back first, as a plain tensor.
    """

    _lora_form: str = STOCK
    _lora_number: int = -1
    _lora_group: LoraGroup | None = None

    base_layer: Any
    merged_adapters: list[str]
    _disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., K] -> [..., N]``."""
        self.sync()
        form = self.form_of_call(x, *args, **kwargs)
        if form == FUSED:
            return self.with_bias(_group(self).run(_cast(x), (self,))[0])
        if form == BESIDE:
            return self._beside(x)
        stock: Tensor = super().forward(x, *args, **kwargs)
        return stock

    def takes_gated(self, like: Tensor) -> bool:
        """Whether ``gated`` computes this layer for an input that is ``silu(gate) * up``, both like this tensor."""
        group = self._lora_group
        if group is None or is_hooked(self) or not gated_act_runs(like.device, _compute_dtype(like)):
            return False
        self.sync()
        return self.form_of_call(like) == FUSED and group.takes_gated()

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``self(silu(gate) * up)``."""
        return self.with_bias(_group(self).run_gated(_cast(gate), _cast(up)))

    def sync(self) -> None:
        """Brings the operands in step with the adapters; a compiled graph finds that done before it runs."""
        if self._lora_group is not None and not torch.compiler.is_compiling() and not in_stock_path(self):
            self._lora_group.sync()

    def form_of_call(self, x: Tensor, *args: Any, **kwargs: Any) -> str:
        """How this call runs."""
        if torch.compiler.is_compiling() and not self._deltatune.in_own_graph:
            return STOCK  # nothing would bring the operands in step before a graph that is not ours runs
        if args or kwargs or self._disable_adapters or self.merged_adapters or in_stock_path(self):
            return STOCK
        if self._lora_form == FUSED and _compute_dtype(x) != self.base_layer.weight.dtype:
            return STOCK  # autocast to another dtype than the weights': torch casts them in every call
        return self._lora_form

    def with_bias(self, y: Tensor) -> Tensor:
        """The base layer's bias added to a product of the group."""
        return y if self.base_layer.bias is None else y + self.base_layer.bias.to(y.dtype)

    def _beside(self, x: Tensor) -> Tensor:
        peft: Any = self
        y: Tensor = self.base_layer(x)
        for name in active_adapters(self):
            dropped = _cast(peft.lora_dropout[name](x))
            product = low_rank(dropped, peft.lora_A[name].weight, peft.lora_B[name].weight, peft.scaling[name])
            y = y + product.to(y.dtype)
        return y

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, on a plain weight."""
        self.release()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The base layer, for PEFT to put in this one's place."""
        self.before_restore()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: nn.Module = self.base_layer
        return base

    def release(self) -> None:
        """Gives the base weights of the whole group back as plain contiguous tensors."""
        if self._lora_group is not None:
            self._lora_group.release()

    def before_restore(self) -> None:
        """Leaves its group and keeps nothing."""
        if self._lora_group is not None:
            self._lora_group.remove(self)
        for name in _OWN:
            self.__dict__.pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._lora_group is not None:
            self._lora_group.drop_if_severed()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        build, parts, state = super().__reduce_ex__(protocol)
        return (
            build,
            parts,
            {name: value for name, value in state.items() if name not in ("_lora_form", "_lora_number")},
        )


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``layer(x)`` for each of them; those that are fused and grouped share what they do to ``x``.

    In a compiled graph ``x`` is then extended once, by one narrow product. Layers with hooks, without adapters or of
    other groups are simply called.
    """
    outputs: list[Tensor | None] = [None] * len(layers)
    joined = _joined(x, layers)
    if len(joined) > 1:
        members = [layers[place] for place in joined]
        products = _group(members[0]).run(_cast(x), members)
        for place, product in zip(joined, products, strict=True):
            outputs[place] = layers[place].with_bias(product)  # type: ignore[operator]
    return tuple(layer(x) if y is None else y for layer, y in zip(layers, outputs, strict=True))


def _joined(x: Tensor, layers: tuple[nn.Module, ...]) -> list[int]:
    """Places of the layers that run as one group, in the order of its targets."""
    found: list[int] = []
    group = None
    for place, layer in enumerate(layers):
        if not isinstance(layer, LoRALinear) or is_hooked(layer):
            continue
        if group is None:
            group = layer._lora_group
            layer.sync()
        if group is not None and layer._lora_group is group and layer.form_of_call(x) == FUSED:
            found.append(place)
    return sorted(found, key=lambda place: layers[place]._lora_number)  # type: ignore[arg-type,return-value]


def _group(layer: Any) -> LoraGroup:
    group: LoraGroup | None = layer._lora_group
    assert group is not None
    return group


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _cast(x: Tensor) -> Tensor:
    return x.to(_compute_dtype(x))
