"""Weights out of their shards and back: whole tensors on rank 0, every rank's part of a whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as clip
from torch.utils import swap_tensors

__all__ = [
    "SHARDS",
    "Parts",
    "clip_grad_norm_",
    "copy_parts",
    "gathered_state",
    "give_storage",
    "part_of",
    "reshard",
    "whole_tensor",
]


def whole_tensor(weight: Tensor) -> Tensor:
    """A weight out of its shards; every rank that holds a part calls it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Parts:
    """How the weights of a model lie on ranks: whole, or in FSDP2's shards."""

    def shape(self, weight: Tensor) -> torch.Size:
        """Of the whole weight."""
        return weight.shape

    def whole(self, weight: Tensor) -> Tensor:
        """A weight of the undivided model; every rank calls it with each."""
        return whole_tensor(weight)

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a whole tensor, as it holds ``like``: in its dtype, on its device."""
        return part_of(whole, like)

    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to a norm of ``max_norm`` over all ranks; returns the norm before, the same on each."""
        return clip_grad_norm_(model, max_norm)

    def saved(self, part: Tensor, like: Tensor) -> Tensor:
        """What is kept of a weight's shape (an optimizer's state), as a checkpoint of all ranks' parts takes it."""
        del like
        return part

    def read(self, saved: Tensor, like: Tensor) -> Tensor:
        """What ``saved`` made, or a whole tensor of as many elements, as this rank's part."""
        if isinstance(saved, DTensor):
            return saved
        return self.part_of(saved.view(self.shape(like)), like)

    def check(self, setting: str = "expert_capacity") -> float:
        """The room for visits to experts that calls so far needed, as a multiple of an even share."""
        del setting
        return 1.0


def gathered_state(
    model: nn.Module, wanted: Callable[[str], bool] = lambda _: True, parts: Parts | None = None
) -> dict[str, Tensor]:
    """``state_dict()`` of a sharded model with whole tensors, in host memory, on rank 0; empty on the others.

    Every rank calls it. Names that share a weight share the tensor, as without shards; one tensor at a time is whole on
    the device.

    Args:
        model: as ``shard_model`` left it.
        wanted: which names to gather.
        parts: how its weights lie on ranks; in shards by default.
    """
    whole_of = (parts or SHARDS).whole
    found, by_weight, first = {}, dict[int, Tensor](), dist.get_rank() == 0
    for name, weight in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if id(weight) not in by_weight:
            whole = whole_of(weight).detach()
            by_weight[id(weight)] = whole.cpu() if first else whole.new_empty(0)
        found[name] = by_weight[id(weight)]
    return found if first else {}


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, in the shards, dtype and device of ``like``; itself where that is whole."""
    if not isinstance(like, DTensor):
        return whole.to(like)
    placed = whole.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_parts(model: nn.Module, state: Mapping[str, Tensor], parts: Parts | None = None) -> None:
    """Copies whole tensors into a model, by the names of its ``state_dict()``; every rank has them all."""
    own, parts = model.state_dict(keep_vars=True), parts or SHARDS
    for name, whole in state.items():
        if name not in own:
            raise ValueError(f"the model has no {name}")
        if whole.shape != (shape := parts.shape(own[name])):
            raise ValueError(f"{name}: expected {list(shape)}, got {list(whole.shape)}")
    for name, whole in state.items():
        own[name].copy_(parts.part_of(whole, own[name]))


def give_storage(weight: nn.Parameter, shape: torch.Size, device: torch.device) -> None:
    """Makes a Parameter of the meta device one of this shape on another, without values.

    It stays the same object, as hooks, ties and optimizers know it.
    """
    swap: Any = swap_tensors
    swap(weight, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=device), weight.requires_grad))


def reshard(model: nn.Module) -> None:
    """Frees what a forward without backward left whole, so that ``parameters()`` are shards; none without shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scales gradients down to a norm of ``max_norm`` over all ranks and weights; returns the norm before, whole."""
    return whole_tensor(clip(model.parameters(), max_norm))


SHARDS: Final = Parts()
"""Weights that are whole, or in shards."""
