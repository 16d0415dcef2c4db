"""Names of weights in groups that transformers' conversions keep apart: what is read or written at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["groups_of"]

Converted = Callable[[list[str]], Mapping[str, Tensor]]


def groups_of(
    names: Iterable[str], whole: Mapping[str, Tensor], converted: Converted
) -> list[tuple[list[str], set[str]]]:
    """Groups of names, as small as they may be, and the names that each is converted to.

    A group is one module of a decoder layer, such as its attention or its experts, and a name outside the layers; or
    where conversions go across those, a whole layer, and all names outside.

    Args:
        names: before the conversion.
        whole: what all of them are converted to, on the meta device.
        converted: what some of them are.

    Raises:
        ValueError: conversions go across layers too.
    """
    names, wanted = list(names), _shapes(whole)
    for group_name in (_module, _layer):
        members: dict[str, list[str]] = {}
        for name in names:
            members.setdefault(group_name(name), []).append(name)
        groups, shapes = [], dict[str, tuple[torch.Size, torch.dtype]]()
        for group in members.values():
            found = _shapes(converted(group))
            groups.append((group, {*found}))
            shapes |= found
        if shapes == wanted and sum(len(found) for _, found in groups) == len(wanted):
            return groups
    raise ValueError("its weights are converted across layers")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _module(name: str) -> str:
    """Of ``model.layers.3.mlp.experts.7.up_proj.weight``, ``model.layers.3.mlp``; the name itself outside layers."""
    parts = name.split(".")
    layer = _layer_at(parts)
    return name if layer is None else ".".join(parts[: layer + 2])


def _layer(name: str) -> str:
    parts = name.split(".")
    layer = _layer_at(parts)
    return "" if layer is None else ".".join(parts[: layer + 1])


def _layer_at(parts: list[str]) -> int | None:
    return next((place for place, part in enumerate(parts) if part.isdecimal()), None)
