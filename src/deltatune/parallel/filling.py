"""Weights of a model that was sharded without storage: rank 0 has them whole, every rank keeps its part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltatune.parallel.state import part_of

__all__ = ["fill", "from_rank_0", "spread", "tensors_of"]


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
def fill(model: nn.Module, whole: dict[str, Tensor], device: torch.device) -> None:
    """Gives a sharded model on the meta device its storage and its weights; every rank calls it.

    One tensor at a time is whole on the device, and ``whole`` is emptied on the way.

    Args:
        model: as ``shard_model`` left it.
        whole: on rank 0 what ``tensors_of`` gave for the model with weights; empty on the others.
        device: where the shards lie.
    """
    attributes = [(module, name) for _, module, name, _ in _attributes(model)]
    model.to_empty(device=device)
    for module, name in attributes:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    spread(tensors_of(model), whole)


@torch.no_grad()
def spread(targets: Mapping[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Sends whole tensors of rank 0 into the tensors of the same names, sharded or not; every rank calls it.

    Raises:
        ValueError: other names or shapes, on every rank.
    """
    described = from_rank_0({name: (value.shape, value.dtype) for name, value in whole.items()})
    if targets.keys() != described.keys():
        raise ValueError(f"expected the same names, got {min(targets.keys() ^ described.keys())} on one side alone")
    for name, (shape, _) in described.items():
        if shape != targets[name].shape:
            raise ValueError(f"{name}: expected {list(targets[name].shape)}, got {list(shape)}")
    for name, (shape, dtype) in described.items():
        target = targets[name].detach()
        device = target.device
        sent = whole.pop(name).to(device).contiguous() if whole else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(sent, src=0)
        target.copy_(part_of(sent, target) if isinstance(target, DTensor) else sent)


def _attributes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                yield path, module, name, value
