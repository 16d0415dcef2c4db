"""The optimizer's state on the disk: by position where weights are whole, by name and in parts where they are not."""

# N output width and r rank of an adapter, X experts

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME

from deltatune.parallel.state import SHARDS, Parts, reshard

__all__ = ["load_optimizer", "save_parts"]

_PARTS: Final = "optimizer"  # the folder of a sharded run's
_GROUPS: Final = "groups.pt"  # in it, the settings of the groups, by position


def save_parts(model: nn.Module, optimizer: Optimizer, folder: Path, parts: Parts = SHARDS) -> None:
    """Writes what every rank holds into ``folder/optimizer``, in the format of torch's distributed checkpoints.

    Every rank calls it. Any number of processes can read it, one that holds whole weights too.
    """
    reshard(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {
        _key(names[id(parameter)], what): parts.saved(value, parameter) if value.shape == parameter.shape else value
        for parameter, values in optimizer.state.items()
        for what, value in values.items()
    }
    save(state, checkpoint_id=folder / _PARTS)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict()["param_groups"], folder / _PARTS / _GROUPS)


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path, parts: Parts = SHARDS) -> None:
    """Takes up what a checkpoint holds, from one process or many, into whole weights or parts; every rank calls it."""
    reshard(model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if (folder / _PARTS).is_dir():
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = _read_parts(folder / _PARTS, {names[id(parameter)]: parameter for parameter in parameters}, parts)
        state = {index: found[names[id(p)]] for index, p in enumerate(parameters) if names[id(p)] in found}
        groups = torch.load(folder / _PARTS / _GROUPS, weights_only=True)
    else:
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=_is_copied(parameters))
        state = {index: _parts(values, parameters[index], parts) for index, values in saved["state"].items()}
        groups = saved["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_copied(parameters: list[Tensor]) -> bool:
    """Whether what is read goes into memory of its own; else it would stay a part of the file."""
    return all(isinstance(parameter, DTensor) or parameter.device.type != "cpu" for parameter in parameters)


def _read_parts(folder: Path, parameters: dict[str, nn.Parameter], parts: Parts) -> dict[str, dict[str, Tensor]]:
    """This rank's parts of what is kept for each of these parameters."""
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}
    for key, about in described.items():
        name, _ = _unpacked(key)
        if name in parameters and isinstance(about, TensorStorageMetadata):
            like, dtype = parameters[name], about.properties.dtype
            # where it was saved as it will lie, each rank reads its part, else all of it
            mine = parts.saved(torch.empty_like(like.detach(), dtype=dtype), like)
            wanted[key] = mine if mine.shape == about.size else torch.empty(about.size, dtype=dtype)
    load(wanted, checkpoint_id=folder, no_dist=not dist.is_initialized())
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in wanted.items():
        name, what = _unpacked(key)
        found.setdefault(name, {})[what] = _part(value, parameters[name], parts)
    return found


def _parts(values: dict[str, Any], parameter: Tensor, parts: Parts) -> dict[str, Any]:
    if not isinstance(parameter, DTensor) and parts.shape(parameter) == parameter.shape:
        return values
    return {what: _part(v, parameter, parts) if isinstance(v, Tensor) else v for what, v in values.items()}


def _part(value: Tensor, parameter: Tensor, parts: Parts) -> Tensor:
    """This rank's part of a tensor of the weight's shape, or ``[N, r, X]`` for ``[N, r X]``; of others the tensor."""
    whole = parts.shape(parameter)
    if isinstance(value, DTensor) or value.shape == whole or (value.ndim == 3 and value.numel() == whole.numel()):
        return parts.read(value, parameter)
    return value


def _key(name: str, what: str) -> str:
    return f"{name}/{what}"


def _unpacked(key: str) -> tuple[str, str]:
    name, _, what = key.rpartition("/")
    return name, what
