"""What is timed on several GPUs: how a prepared model is divided among ranks, and what one GPU does beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.systems import Batch, draw_lengths
from deltatune import Prepared, parallelize
from deltatune.parallel.parallelize import Parallel
from deltatune.parallel.sharding import shard_model
from deltatune.parallel.slice import cut_batch
from deltatune.parallel.state import SHARDS, Parts

__all__ = ["SYSTEMS", "Divided", "System", "part_of_pack"]


class Divided(NamedTuple):
    """What to call, and how the weights of the prepared model lie on ranks."""

    model: nn.Module
    parts: Parts = SHARDS


Divide = Callable[[Prepared, torch.dtype | None], Divided]
"""A prepared model, and the dtype that float32 weights are computed with in -> the model, divided."""


@dataclass(frozen=True)
class System:
    """One way to train on several GPUs. A further one is a further entry of ``SYSTEMS``.

    Attributes:
        name: as on the command line.
        divide: the model among all ranks, whose backward averages gradients over them.
        alone: the model on one GPU.
        full: all weights train, float32 ones that are computed with in the activations' dtype; else adapters alone.
        checkpointing: of both.
        shares_pack: ranks hold one document together; else each has a pack of its own.
        short: the pack that ranks share has short documents; ``"cut"``: some lie on two ranks, ``"whole"``: none does.
        how: what the ranks do, and what the one GPU does, in words.
        states: ranks hand states of recurrent layers round, by all-gathers; a model needs such layers.
        experts: adapters on all routed experts as well; a model needs some.
    """

    name: str
    divide: Divide
    alone: Divide
    full: bool
    checkpointing: str
    shares_pack: bool
    how: str
    states: bool = False
    experts: bool = False
    short: Literal["cut", "whole"] | None = None

    def lengths(self, tokens: int, parts: int, seed: int) -> list[int]:
        """Of a pack's documents, which fill so many parts whole; where they are cut, half of the last comes first."""
        if not self.shares_pack:
            return draw_lengths(tokens, seed=seed)
        if self.short is None:
            return [tokens]
        drawn = [n for part in range(parts) for n in draw_lengths(tokens // parts, seed=seed + part)]
        half = drawn[-1] // 2
        return drawn if self.short == "whole" else [half, *drawn[:-1], drawn[-1] - half]

    def part(self, batch: Batch, rank: int, size: int) -> Batch:
        """What a rank takes of a batch that it has whole."""
        return part_of_pack(batch, rank, size) if self.shares_pack and size > 1 else batch


def part_of_pack(batch: Batch, rank: int, size: int) -> dict[str, Any]:
    """A rank's tokens of a pack that all have."""
    return cut_batch(batch, rank=rank, size=size)


def _whole(prepared: Prepared, _: torch.dtype | None) -> Divided:
    return Divided(prepared.model)


def _replicated(prepared: Prepared, _: torch.dtype | None) -> Divided:
    return Divided(parallelize(prepared).model)


def _sharded(prepared: Prepared, param_dtype: torch.dtype | None) -> Divided:
    return Divided(parallelize(prepared, shard=dist.get_world_size(), param_dtype=param_dtype).model)


def _one_shard(prepared: Prepared, param_dtype: torch.dtype | None) -> Divided:
    """FSDP2 over this process alone; no other is asked."""
    group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    device = next(prepared.model.parameters()).device
    shard_model(prepared.model, DeviceMesh.from_group(group, device.type), param_dtype=param_dtype)
    return Divided(prepared.model)


def _in_sequence(prepared: Prepared, _: torch.dtype | None) -> Divided:
    return Divided(parallelize(prepared, sequence=dist.get_world_size()).model)


def _by_states(prepared: Prepared, _: torch.dtype | None) -> Divided:
    return Divided(parallelize(prepared, sequence=dist.get_world_size(), recurrent="state").model)


def _by_experts(prepared: Prepared, _: torch.dtype | None) -> Divided:
    return _with_experts(parallelize(prepared, expert=dist.get_world_size()))


def _by_experts_in_shards(prepared: Prepared, param_dtype: torch.dtype | None) -> Divided:
    size = dist.get_world_size()
    return _with_experts(parallelize(prepared, shard=size, expert=size, param_dtype=param_dtype))


def _by_experts_in_sequence(prepared: Prepared, _: torch.dtype | None) -> Divided:
    size = dist.get_world_size()
    return _with_experts(parallelize(prepared, sequence=size, expert=size))


def _with_experts(parallel: Parallel) -> Divided:
    return Divided(parallel.model, parallel.experts or SHARDS)


_ONE_SHARD: Final = "one GPU: FSDP2 on a mesh of one, the same units, casts and optimizer without communication"

SYSTEMS: Final[Mapping[str, System]] = {
    system.name: system
    for system in (
        System(
            "ddp-lora", _replicated, _whole, full=False, checkpointing="none", shares_pack=False,
            how="DistributedDataParallel, LoRA on q, k, v and o, a pack for each rank; one GPU: the model as prepared",
        ),
        System(
            "fsdp-full", _sharded, _one_shard, full=True, checkpointing="layer", shares_pack=False,
            how=f"FSDP2, all weights train, float32, gathered in the activations' dtype, a pack for each; {_ONE_SHARD}",
        ),
        System(
            "fsdp-lora", _sharded, _one_shard, full=False, checkpointing="layer", shares_pack=False,
            how=f"FSDP2, LoRA on q, k, v and o, base in the activations' dtype, a pack for each rank; {_ONE_SHARD}",
        ),
        System(
            "sequence", _in_sequence, _whole, full=False, checkpointing="layer", shares_pack=True,
            how=(
                "Ulysses, one document over all ranks, LoRA on q, k, v and o, gradients by DistributedDataParallel; "
                "one GPU: the same document, whose attention costs a token as much; where it does not fit, half of it, "
                "a quarter and so on (one_gpu_tokens), whose attention costs less: the ratio is then below what it "
                "would be"
            ),
        ),
        System(
            "sequence-state", _by_states, _whole, full=False, checkpointing="layer", shares_pack=True, states=True,
            how=(
                "as sequence, but Gated DeltaNet layers keep a rank's tokens and all heads and hand states round; "
                "attention by heads (Ulysses); one GPU: the same as of sequence"
            ),
        ),
        System(
            "sequence-cut", _in_sequence, _whole, full=False, checkpointing="layer", shares_pack=True, short="cut",
            how=(
                "as sequence, but a pack of documents of 64 to 2048 tokens, of which some lie on two ranks; one GPU: "
                "the same pack, or as much of such as fits"
            ),
        ),
        System(
            "sequence-whole", _in_sequence, _whole, full=False, checkpointing="layer", shares_pack=True, short="whole",
            how="as sequence-cut, with each document whole on one rank, so that layers exchange nothing",
        ),
        System(
            "fsdp-experts", _sharded, _one_shard, full=False, checkpointing="layer", shares_pack=False, experts=True,
            how=(
                "FSDP2, LoRA on q, k, v and o and on all routed experts, base in the activations' dtype, each layer's "
                f"experts gathered, a pack for each rank; {_ONE_SHARD}"
            ),
        ),
        System(
            "expert", _by_experts, _whole, full=False, checkpointing="layer", shares_pack=False, experts=True,
            how=(
                "a rank holds its part of the experts of each layer and tokens travel to them, all other weights "
                "whole, adapters as of fsdp-experts, a pack for each rank; one GPU: the model as prepared"
            ),
        ),
        System(
            "expert-shard", _by_experts_in_shards, _one_shard, full=False, checkpointing="layer", shares_pack=False,
            experts=True,
            how=(
                "as expert, and FSDP2 over the same ranks for all other weights, gathered in the activations' dtype, a "
                f"pack for each rank; {_ONE_SHARD}"
            ),
        ),
        System(
            "sequence-expert", _by_experts_in_sequence, _whole, full=False, checkpointing="layer", shares_pack=True,
            experts=True,
            how=(
                "as sequence, one document over all ranks, which hold the experts of each layer together as of expert; "
                "one GPU: the same as of sequence, with adapters on experts"
            ),
        ),
    )
}  # fmt: skip
"""Name -> system."""
