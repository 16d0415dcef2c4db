"""Weights out of their shards and back: whole tensors on rank 0, every rank's part of a whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as clip

__all__ = ["clip_grad_norm_", "copy_parts", "gathered_state", "part_of", "reshard", "whole_tensor"]


def whole_tensor(weight: Tensor) -> Tensor:
    """A weight out of its shards; every rank that holds a part calls it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def gathered_state(
    model: nn.Module,
    wanted: Callable[[str], bool] = lambda _: True,
    whole_of: Callable[[Tensor], Tensor] = whole_tensor,
) -> dict[str, Tensor]:
    """``state_dict()`` of a sharded model with whole tensors, in host memory, on rank 0; empty on the others.

    Every rank calls it. Names that share a weight share the tensor, as without shards; one tensor at a time is whole on
    the device.

    Args:
        model: as ``shard_model`` left it.
        wanted: which names to gather.
        whole_of: makes a weight whole.
    """
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
def copy_parts(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into a model, by the names of its ``state_dict()``; every rank has them all."""
    own = model.state_dict(keep_vars=True)
    for name, whole in state.items():
        if whole.shape != own[name].shape:
            raise ValueError(f"{name}: expected {list(own[name].shape)}, got {list(whole.shape)}")
        own[name].copy_(part_of(whole, own[name]))


def reshard(model: nn.Module) -> None:
    """Frees what a forward without backward left whole, so that ``parameters()`` are shards; none without shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scales gradients down to a norm of ``max_norm`` over all ranks and weights; returns the norm before, whole."""
    return whole_tensor(clip(model.parameters(), max_norm))
