"""Finding the family of a model, and refusing by name what no family knows."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.models.families import ANY, FAMILIES
from deltatune.models.family import Family

__all__ = ["ANY", "FAMILIES", "family_of", "recurrent_modules"]

# Parts of class names of layers whose state runs along the sequence.
_RECURRENT = (
    "deltanet", "mamba", "rwkv", "lightningattention", "linearattention", "retention", "recurrent", "rglru",
    "shortconv", "xlstm", "mlstm", "slstm", "kimidelta", "conv1d",
)  # fmt: skip


def family_of(text_model: nn.Module) -> Family:
    """The family of a text model.

    Raises:
        ValueError: a model with a recurrent layer that no family knows, or one whose attention cannot be replaced
            through transformers' attention interface.
    """
    config: Any = text_model.config
    for family in FAMILIES:
        if config.model_type == family.model_type:
            return family
    recurrent = recurrent_modules(text_model)
    known = ", ".join(family.name for family in FAMILIES)
    if recurrent:
        raise ValueError(
            f"{type(text_model).__name__} (model_type {config.model_type!r}) has recurrent layers that no family "
            f"knows: {', '.join(recurrent)}. Packed documents would leak through their state. Known families: {known}, "
            "and any decoder with attention alone"
        )
    if not getattr(text_model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(text_model).__name__} (model_type {config.model_type!r}) does not take its attention from "
            f"transformers' attention interface, so its documents cannot be kept apart. Known families: {known}, and "
            "any decoder that does"
        )
    return ANY


def recurrent_modules(text_model: nn.Module) -> list[str]:
    """Names of the classes under a text model that carry state along the sequence."""
    names = {type(module).__name__ for module in text_model.modules()}
    found = {name for name in names if any(part in name.lower().replace("_", "") for part in _RECURRENT)}
    kinds = set(getattr(text_model.config, "layer_types", None) or ())
    found |= {kind for kind in kinds if isinstance(kind, str) and "attention" not in kind and kind != "moe"}
    found |= kinds & {"linear_attention"}
    if not found and getattr(text_model, "_is_stateful", False):
        found = {f"{type(text_model).__name__} (declared stateful)"}
    return sorted(found)
