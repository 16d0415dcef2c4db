"""Weights of a model that was sharded without storage: rank 0 has them one after another, every rank keeps its part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltatune.parallel.state import SHARDS, Parts, give_storage

__all__ = ["Piece", "fill", "from_rank_0", "spread", "tensors_of"]

Piece = tuple[tuple[str, ...], Tensor]
"""A whole tensor, and all names that it is the value of."""


def from_rank_0(value: Any) -> Any:
    """What rank 0 was given, on every rank: plain data and small tensors."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All that a model holds, by name, each once: parameters, buffers, and tensors that are attributes."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return found | {f"{path}.{name}": value for path, module, name, value in _attributes(model)}


@torch.no_grad()
def fill(model: nn.Module, pieces: Iterable[Piece] | None, device: torch.device, parts: Parts = SHARDS) -> None:
    """Gives a model on the meta device, of which ranks hold parts, its storage and its weights; every rank calls it.

    Args:
        model: as ``shard_model`` or ``divide_experts`` left it.
        pieces: on rank 0 what ``tensors_of`` names, in any order; None on the others.
        device: where the parts lie.
        parts: how they do.

    Raises:
        ValueError: other names or shapes, or weights that cannot be read; on every rank.
    """
    attributes = [(module, name) for _, module, name, _ in _attributes(model)]
    for weight in model.parameters():
        if weight.is_meta and not isinstance(weight, DTensor):
            # shards stay the same Parameters in to_empty, of others it would untie what is tied
            give_storage(weight, weight.shape, device)
    model.to_empty(device=device)
    for module, name in attributes:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    spread(tensors_of(model), pieces, parts)


@torch.no_grad()
def spread(targets: Mapping[str, Tensor], pieces: Iterable[Piece] | None, parts: Parts = SHARDS) -> None:
    """Sends whole tensors of rank 0 into those of the same names, divided or not; every rank calls it.

    One tensor at a time is whole on the device; rank 0 holds what ``pieces`` does.

    Args:
        targets: on every rank the same names.
        pieces: on rank 0; None on the others.
        parts: how the targets lie on ranks.

    Raises:
        ValueError: other names or shapes, or pieces that cannot be read; on every rank.
    """
    left, source = {*targets}, None if pieces is None else iter(pieces)
    while True:
        head, whole = _next(source)
        names, shape, dtype = from_rank_0(head)
        if not names:
            break
        _check(names, shape, targets, left, parts)
        device = targets[names[0]].device
        sent = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole.to(device).contiguous()
        dist.broadcast(sent, src=0)
        for name in names:
            target = targets[name]
            target.copy_(parts.part_of(sent, target))
        left.difference_update(names)
    if isinstance(shape, str):
        raise ValueError(shape)
    if left:
        raise ValueError(f"expected the same names, got no {min(left)}")


def _next(source: Iterator[Piece] | None) -> tuple[tuple[tuple[str, ...], Any, Any], Tensor | None]:
    """What rank 0 tells of its next tensor, and the tensor; no names at the end, or with why there are no more."""
    if source is None:
        return ((), None, None), None
    try:
        names, whole = next(source, ((), None))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        return ((), str(error), None), None
    return (names, None if whole is None else whole.shape, None if whole is None else whole.dtype), whole


def _check(
    names: tuple[str, ...], shape: torch.Size, targets: Mapping[str, Tensor], left: set[str], parts: Parts
) -> None:
    for name in names:
        if name not in left:
            raise ValueError(
                f"expected the same names, got {name} {'twice' if name in targets else 'on one side alone'}"
            )
        if shape != (expected := parts.shape(targets[name])):
            raise ValueError(f"{name}: expected {list(expected)}, got {list(shape)}")


def _attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                yield path, module, name, value
