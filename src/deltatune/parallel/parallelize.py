"""parallelize(prepared): a prepared model on several processes, for a training loop of one's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltatune.hf.model import device_of
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sharding import shard_model
from deltatune.parallel.sizes import choose_sizes
from deltatune.parallel.state import clip_grad_norm_, gathered_state
from deltatune.preparation import Prepared

__all__ = ["Parallel", "parallelize"]


@dataclass(frozen=True)
class Parallel:
    """A model on several processes.

    Attributes:
        model: what to call. Its backward averages gradients over ``mesh.data_size`` ranks, so a loss that is divided by
            the global number of targets is multiplied by ``mesh.data_size``.
        mesh: the processes, and which packs this one reads: ``packs[mesh.data_rank :: mesh.data_size]``.
        prepared: what was parallelized.
    """

    model: nn.Module
    mesh: Mesh
    prepared: Prepared

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients down to this norm over all ranks; returns the norm before, the same on every rank."""
        return clip_grad_norm_(self.model, max_norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by the names of the model without shards, in host memory, on rank 0; every rank calls it.

        ``prepared.model.save_pretrained(folder, state_dict=...)`` on rank 0 writes the files of an unsharded model.
        """
        if self.mesh.shard_size > 1:
            return gathered_state(self.prepared.model)
        return self.prepared.model.state_dict() if self.mesh.data_rank == 0 else {}


def parallelize(
    prepared: Prepared,
    *,
    replicate: int | None = None,
    shard: int = 1,
    sequence: int = 1,
    expert: int = 1,
    param_dtype: torch.dtype | None = None,
) -> Parallel:
    """Divides a prepared model among the processes of the default process group, in place.

    ``replicate * shard`` is the number of processes. With ``shard=1`` every process keeps whole weights
    (DistributedDataParallel). With more, ``shard`` neighbours hold one copy among them (FSDP2): each decoder layer is
    gathered for its forward and its backward, and rank r of them keeps the r-th part of every weight, its gradient and
    the optimizer's state. An optimizer is made afterwards, from ``Parallel.model.parameters()``.

    Args:
        prepared: what ``prepare`` returned, on the device where it will train, adapters included.
        replicate: copies of the weights; None for as many as the processes make.
        shard: processes that hold one copy.
        sequence, expert: 1.
        param_dtype: what float32 weights are gathered and computed with in, such as ``torch.bfloat16``; the decay of
            recurrent layers stays float32, and gradients are averaged in float32. Needs ``shard``; None computes in the
            weights' own dtype.

    Raises:
        ValueError: sizes that are not the number of processes, an axis that is not there, a model that is sharded
            already, compiled as a whole, or of several dtypes that train together.
    """
    for name, size, why in (("sequence", sequence, "packs"), ("expert", expert, "experts")):
        if size != 1:
            raise ValueError(f"{name}={size} is not there yet: {why} are not divided; leave it out")
    if not dist.is_initialized():
        raise ValueError("several processes must have met: call torch.distributed.init_process_group() first")
    sizes = choose_sizes(dist.get_world_size(), replicate=replicate, shard=shard)
    mesh = Mesh(dist.get_world_size(), dist.get_rank(), sizes.shard)
    model, device = prepared.model, device_of(prepared.model)
    if sizes.shard > 1:
        shard_model(model, mesh.weights_mesh(device.type), param_dtype=param_dtype)
        return Parallel(model, mesh, prepared)
    if param_dtype is not None:
        raise ValueError(f"param_dtype={param_dtype} acts on sharded weights; give shard, or use torch.autocast")
    placed = None if device.type == "cpu" else [device]
    return Parallel(DistributedDataParallel(model, device_ids=placed), mesh, prepared)
