"""What a family declares, and how a model's family is found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltatune.layers.causal_lm import CausalLM
from deltatune.subclass import Swapped, stock_class

__all__ = ["IMAGES", "ROUTER_LOSS", "SUPPORTED", "Family", "Swap", "count_layers", "count_sparse"]

#: A feature held by the laws; one that works with a known limit is ``experimental:`` and the limit.
SUPPORTED = "supported"

#: The router's auxiliary loss couples documents by definition.
ROUTER_LOSS = "experimental: output_router_logits works with compile of layers; of the whole model it is refused"

IMAGES = "experimental: the vision tower stays stock; boundaries must be passed together with three-row positions"


@dataclass(frozen=True)
class Swap:
    """A stock class by its name in the family's module, the layer its instances become, how many a config implies."""

    stock: str
    layer: type[Swapped]
    expected: Callable[[Any], int]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the name users know it by, and transformers the folder that defines its classes.
        model_type: ``model_type`` of its text config.
        swaps: which stock module becomes which of our layers; the text model, its decoder layers and the model with
            the head are found by structure and not listed.
        mask_form: what its text model takes in place of a mask; see ``Options``.
        features: how it works there, of features that not every family supports.
        refusals: checks of a text model, each returning why it cannot be prepared, or None. Attention dropout is
            refused of every family.
        final_norm: what the norm behind the last layer becomes, where it is of the family's own module.
    """

    name: str
    model_type: str
    swaps: tuple[Swap, ...]
    mask_form: str
    features: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[Callable[[Any], str | None], ...] = ()
    final_norm: type[Swapped] | None = None

    @property
    def module(self) -> str:
        """The transformers module that defines its classes."""
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def ops(self) -> tuple[str, ...]:
        """What its layers and the loss call; without layers of its own the ops behind the attention interface."""
        layers = [swap.layer for swap in self.swaps]
        layers += [self.final_norm] if self.final_norm is not None else []
        called = [op for layer in layers for op in layer.ops] if layers else ["varlen_attention"]
        return tuple(dict.fromkeys([*called, *CausalLM.ops]))

    def find(self, stock: str, text_model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Path and module of every instance of a stock class, swapped already or not."""
        # another tool may have put its class in the place of this one since
        current = getattr(importlib.import_module(self.module), stock)
        named = ((path, module, stock_class(module)) for path, module in text_model.named_modules())
        return [
            (path, module)
            for path, module, cls in named
            if cls is current or (cls.__module__, cls.__qualname__) == (self.module, stock)
        ]


def count_layers(*kinds: str) -> Callable[[Any], int]:
    """Decoder layers of these ``layer_types``; every layer where a config has none."""

    def expected(config: Any) -> int:
        types = getattr(config, "layer_types", None)
        if types is None:
            return int(config.num_hidden_layers)
        return sum(kind in kinds for kind in types)

    return expected


def count_sparse(config: Any) -> int:
    """Decoder layers whose MLP is a mixture of experts."""
    dense = getattr(config, "mlp_only_layers", None) or []
    step = getattr(config, "decoder_sparse_step", 1) or 1
    if not config.num_experts:
        return 0
    return sum(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))
