"""The weight files of a model of which ranks hold parts, gathered and written a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.errors import first_line
from deltatune.hf.writing import FILE_SIZE, SavedWeights
from deltatune.parallel.filling import from_rank_0
from deltatune.parallel.state import SHARDS, Parts, gathered_state, reshard

__all__ = ["save_weights"]


def save_weights(
    model: nn.Module, folder: Path | None, *, parts: Parts = SHARDS, max_shard_size: int | str = FILE_SIZE
) -> list[str]:
    """Writes the files that ``save_pretrained`` writes of a model's weights, alone; every rank calls it.

    One tensor at a time is whole on the device, those of one module in rank 0's host memory.

    Args:
        model: divided, without adapters.
        folder: where to, on rank 0; None on the others.
        parts: how its weights lie on ranks.
        max_shard_size: of a file, as ``save_pretrained`` takes it.

    Returns:
        What should be said of it, on rank 0.
    """
    reshard(model)
    state = model.state_dict(keep_vars=True)
    plan, said = None, list[str]()
    if folder is not None:
        described = {name: torch.empty(parts.shape(t), dtype=t.dtype, device="meta") for name, t in state.items()}
        try:
            plan = SavedWeights.of(model, described, max_shard_size)
        except (RuntimeError, TypeError, ValueError) as error:  # such as a conversion that looks at numbers
            why = first_line(error)
            said.append(f"rank 0 has gathered the whole model in host memory to save it: {why}")
    order = from_rank_0(None if plan is None else [name for group in plan.groups for name in group])
    if order is None:
        whole = gathered_state(model, parts=parts)
        if folder is not None:
            cast("Any", model).save_pretrained(str(folder), state_dict=whole, max_shard_size=max_shard_size)
        return said
    gathered = (_whole(state[name], parts, here=folder is not None) for name in order)
    try:
        if plan is not None and folder is not None:
            plan.write(folder, lambda _: next(gathered))
    finally:
        _exhaust(gathered)  # the other ranks wait for all of them, whatever fails here
    return said


def _whole(weight: Tensor, parts: Parts, *, here: bool) -> Tensor:
    whole = parts.whole(weight).detach()
    return whole.cpu() if here else whole.new_empty(0)


def _exhaust(tensors: Iterator[Tensor]) -> None:
    for _ in tensors:
        pass
