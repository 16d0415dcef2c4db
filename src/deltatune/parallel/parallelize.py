"""parallelize(prepared): a prepared model on several processes, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltatune.hf.model import device_of, text_config
from deltatune.hf.units import trained_beside_text
from deltatune.packing.group import Recurrent, SequenceGroup
from deltatune.parallel.experts import (
    DividedExperts,
    check_expert_ranks,
    check_expert_size,
    divide_experts,
    parameters_of_experts,
    replicate_beside,
)
from deltatune.parallel.heads import check_sequence_size
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sequence import sequence_group_of, shard_sequence
from deltatune.parallel.sharding import check_shardable, shard_model
from deltatune.parallel.sizes import choose_sizes
from deltatune.parallel.slice import batch_of_rank
from deltatune.parallel.state import clip_grad_norm_, copy_parts, gathered_state
from deltatune.preparation import Prepared

__all__ = ["Parallel", "parallelize"]


@dataclass(frozen=True)
class Parallel:
    """A model on several processes.

    Attributes:
        model: what to call. Its backward averages gradients over ``mesh.size`` ranks, so a loss that is divided by the
            global number of targets is multiplied by ``mesh.size``.
        mesh: the processes, and which packs this one reads: ``packs[mesh.data_rank :: mesh.data_size]``.
            ``mesh.sum_over_data`` sums counts of packs, ``mesh.sum_over_ranks`` the losses that ``model`` gives.
        prepared: what was parallelized.
        experts: what ranks hold of the experts; None where each has them all.
    """

    model: nn.Module
    mesh: Mesh
    prepared: Prepared
    experts: DividedExperts | None = None

    def part(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a batch ``model`` takes here: all of it, or this rank's part where several hold a pack together."""
        return batch_of_rank(batch, self.mesh)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients down to this norm over all ranks; returns the norm before, the same on every rank."""
        if self.experts is not None:
            return self.experts.clip_grad_norm_(self.model, max_norm)
        return clip_grad_norm_(self.model, max_norm)

    def check(self) -> float:
        """The capacity for experts that steps since the last check needed, at most; 1 where each rank has all experts.

        Every rank calls it, each time it logs, say: it waits for the device, and a step does not.

        Raises:
            UserError: on every rank, more than ``expert_capacity``, so that visits of tokens to experts were left out;
                with the layer, the rank and what would have been enough.
        """
        return 1.0 if self.experts is None else self.experts.check()

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by the names of the model without shards, in host memory, on rank 0; every rank calls it.

        ``prepared.model.save_pretrained(folder, state_dict=...)`` on rank 0 writes the files of an unsharded model.
        """
        return gathered_state(self.prepared.model, parts=self.experts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies whole tensors into the model, by the names that ``state_dict`` gives; every rank has them all.

        Raises:
            ValueError: a name that the model lacks, or a tensor of another shape; nothing is copied then.
        """
        copy_parts(self.prepared.model, state, self.experts)


def parallelize(
    prepared: Prepared,
    *,
    replicate: int | None = None,
    shard: int = 1,
    sequence: int = 1,
    recurrent: Recurrent = "heads",
    expert: int = 1,
    expert_capacity: float = 1.5,
    param_dtype: torch.dtype | None = None,
) -> Parallel:
    """Divides a prepared model among the processes of the default process group, in place.

    ``replicate * shard`` is the number of processes. With ``shard=1`` every process keeps whole weights
    (DistributedDataParallel). With more, ``shard`` neighbours hold one copy among them (FSDP2): each decoder layer is
    gathered for its forward and its backward, and rank r of them keeps the r-th part of every weight, its gradient and
    the optimizer's state. Weights that train are taken from rank 0; frozen ones must be the same on every rank. An
    optimizer is made afterwards, from ``Parallel.model.parameters()``.

    ``sequence`` neighbours read the same packs and hold a part of each (``Parallel.part``): the axis lies inside the
    others, so ``{shard: 4, sequence: 2}`` on 4 processes are 2 data ranks whose weights lie in 4 shards. Their losses
    add up to the pack's. Attention and the delta rule get some heads for all tokens of the pack; see
    ``shard_sequence``.

    Args:
        prepared: what ``prepare`` returned, on the device where it will train, adapters included.
        replicate: copies of the weights; None for as many as the processes make.
        shard: processes that hold one copy.
        sequence: processes that hold a pack together, each an equal part of its tokens; 1 takes the group that
            ``shard_sequence`` has put the model into, if any, as it is.
        recurrent: how they divide recurrent layers; see ``shard_sequence``.
        expert: processes that hold the routed experts of a mixture together, neighbours too, each as many of a layer;
            the rest of the weights goes by ``replicate`` and ``shard``. Tokens travel to their experts, so the
            processes call the model together, with batches of as many tokens.
        expert_capacity: how many times its even share of all visits of tokens to experts a process has room for. What
            is beyond would be left out, and ``Parallel.check`` raises; from ``expert`` on that cannot be.
        param_dtype: what float32 weights are gathered and computed with in, such as ``torch.bfloat16``; the decay of
            recurrent layers stays float32, and gradients are averaged in float32. Needs ``shard``; None computes in the
            weights' own dtype.

    Raises:
        ValueError: sizes that are not the number of processes, a group whose ranks are no neighbours, an axis that is
            not there, a model that is sharded already; with ``shard``, one that is compiled as a whole, that trains
            outside of the text model and the head (a vision tower), or whose weights that train together have several
            dtypes.
        UserError: sizes that the model's heads or experts cannot be divided by, with those that they can.
    """
    if expert != 1:
        check_expert_size(prepared.model, expert, expert_capacity)
    if not dist.is_initialized():
        raise ValueError("several processes must have met: call torch.distributed.init_process_group() first")
    group = sequence_group_of(prepared.model) if sequence == 1 else None
    ranks_of_a_pack = sequence if group is None else group.size
    sizes = choose_sizes(dist.get_world_size(), replicate=replicate, shard=shard, sequence=ranks_of_a_pack)
    if sequence != 1:
        check_sequence_size(text_config(prepared.model), sequence, recurrent)
    check_expert_ranks(prepared.model, expert, dist.get_world_size())
    mesh = Mesh.at(dist.get_world_size(), dist.get_rank(), shard=sizes.shard, sequence=ranks_of_a_pack, expert=expert)
    if group is not None:
        _check_neighbours(group, mesh)
    model, device = prepared.model, device_of(prepared.model)
    if sizes.shard == 1 and param_dtype is not None:
        raise ValueError(f"param_dtype={param_dtype} acts on sharded weights; give shard, or use torch.autocast")
    if sizes.shard > 1:
        check_shardable(model, beside=parameters_of_experts(model) if expert != 1 else set())
    _take_from_rank_0(model)
    experts = None
    if expert != 1:
        experts = divide_experts(model, mesh, capacity=expert_capacity, dtype=param_dtype)
    apart = set[nn.Parameter]() if experts is None else set(experts.parameters)
    called = model
    if sizes.shard > 1:
        shard_model(model, mesh.weights_mesh(device.type), param_dtype=param_dtype, beside=apart)
    else:
        called = _replicated(model, device, apart)
    if sequence != 1:
        shard_sequence(prepared, mesh.sequence_group(device.type), recurrent=recurrent)
    return Parallel(called, mesh, prepared, experts)


def _check_neighbours(group: SequenceGroup, mesh: Mesh) -> None:
    named: Any = dist.distributed_c10d
    ranks = dist.get_process_group_ranks(named._resolve_process_group(group.name))
    first = mesh.data_rank * group.size
    if ranks != [*range(first, first + group.size)]:
        raise ValueError(
            f"the model is in a sequence group of ranks {ranks}, and ranks that hold packs together are neighbours; "
            f"give sequence={group.size} in place of shard_sequence"
        )


def _take_from_rank_0(model: nn.Module) -> None:
    """Makes what trains the same on every rank: each may have drawn first values of adapters from a seed of its own."""
    for weight in model.parameters():
        if weight.requires_grad:
            dist.broadcast(weight.detach(), src=0)


def _replicated(model: nn.Module, device: torch.device, apart: set[nn.Parameter]) -> nn.Module:
    """With gradients averaged over all processes, but for those of ``apart``.

    Weights that a call with text alone leaves out are looked for in each call's graph, where some train.
    """
    if apart and not replicate_beside(model, apart):
        return model
    replicated = DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device],
        find_unused_parameters=bool(trained_beside_text(model)),
    )
    # no layer writes a buffer: sending them out before each step would be one more time that all ranks wait
    replicated.broadcast_buffers = False  # an argument of this name warns in torch 2.13, and 2.11 knows no other
    return replicated
