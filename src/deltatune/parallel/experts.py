"""Expert parallel: the ranks of a group hold the routed experts of every layer together, each consecutive ones."""

# P ranks of a group, X experts of a layer, L = X / P of a rank, R ranks, r rank of an adapter, N its output width

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.hf.experts import PART, experts_layout, other_experts
from deltatune.layers.dispatch import CAPACITY_STEPS, ExpertPart
from deltatune.layers.experts import Experts
from deltatune.lora.parameters import is_parameter_lora
from deltatune.parallel.expert_counts import common_sizes, no_experts, not_divided
from deltatune.parallel.mesh import REPLICATE, Mesh
from deltatune.parallel.state import Parts, give_storage, whole_tensor

__all__ = [
    "DividedExperts",
    "check_expert_ranks",
    "check_expert_size",
    "divide_experts",
    "expert_sizes",
    "norm_of",
    "parameters_of_experts",
    "replicate_beside",
]

EXPERT: Final = "expert"


class Division(NamedTuple):
    """How a tensor lies on ranks."""

    experts: int  # X
    innermost: bool  # experts come last, as in PEFT's B ``[N, r X]``; otherwise first

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Of one rank, with storage of its own."""
        if self.innermost:
            return whole.view(whole.shape[0], -1, self.experts).chunk(size, -1)[rank].flatten(1).clone()
        return whole.chunk(size)[rank].clone()

    def shape(self, part: torch.Size, size: int) -> torch.Size:
        """Of the whole, where one of ``size`` ranks has a part of this shape."""
        return torch.Size((part[0], part[1] * size) if self.innermost else (part[0] * size, *part[1:]))

    def by_expert(self, part: Tensor, held: int) -> Tensor:
        """With a dim of the experts alone: ``[N, r, L]`` where they come last."""
        return part.view(part.shape[0], -1, held) if self.innermost else part

    def whole(self, parts: list[Tensor]) -> Tensor:
        """Of those of all ranks."""
        if self.innermost:
            held = self.experts // len(parts)
            return torch.cat([part.view(part.shape[0], -1, held) for part in parts], -1).flatten(1)
        return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class DividedExperts(Parts):
    """What ``divide_experts`` made of a model, and how its weights lie on ranks: experts, and shards of the others.

    Attributes:
        mesh: of all ranks, ``[replicate, expert]``.
        group: P ranks that hold all experts together.
        capacity: of every layer; see ``ExpertPart``.
        loads: of the layers, by the paths of their experts: ``ExpertPart.load``.
        parameters: weights, biases and adapters of experts, of which this rank holds a part.
        trained: those that trained when they were divided.
    """

    mesh: DeviceMesh
    group: ProcessGroup
    capacity: float
    loads: Mapping[str, Tensor]
    parameters: Mapping[nn.Parameter, Division]
    trained: Set[nn.Parameter]

    def shape(self, weight: Tensor) -> torch.Size:
        """Of a weight of the model before it was divided."""
        division = self._division(weight)
        return super().shape(weight) if division is None else division.shape(weight.shape, self.group.size())

    def whole(self, weight: Tensor) -> Tensor:
        """A weight of the model before it was divided; every rank calls it with each."""
        division = self._division(weight)
        if division is None:
            return whole_tensor(weight)
        part = weight.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        dist.all_gather(parts, part, group=self.group)
        return division.whole(parts)

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's experts of a whole tensor, where ``like`` holds experts; else its shard, or the tensor itself."""
        division = self._division(like)
        mine = whole if division is None else division.part(whole, self.group.rank(), self.group.size())
        return super().part_of(mine, like)

    def saved(self, part: Tensor, like: Tensor) -> Tensor:
        """A part of what belongs to a weight of experts as a DTensor: ``[X, ...]``, or ``[N, r, X]``."""
        division = self._division(like)
        if division is None:
            return part
        by_expert = division.by_expert(part.detach(), division.experts // self.group.size())
        dim = by_expert.ndim - 1 if division.innermost else 0
        return DTensor.from_local(by_expert, self.mesh, [Replicate(), Shard(dim)], run_check=False)

    def read(self, saved: Tensor, like: Tensor) -> Tensor:
        """What ``saved`` made, or a whole tensor of as many elements, as this rank's part."""
        if self._division(like) is not None and isinstance(saved, DTensor):
            return saved.to_local().view(like.shape)
        return super().read(saved, like)

    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to a norm of ``max_norm``, in which each weight counts once, whoever holds it."""
        self.refuse_unfrozen()
        own = [p.grad for p in model.parameters() if p.grad is not None and p not in self.parameters]
        experts = [p.grad for p in self.parameters if p.grad is not None]
        device = hf_model.device_of(model)
        square = norm_of(experts, device).square()
        dist.all_reduce(square, group=self.group)
        norm = (norm_of(own, device).square() + square).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in (*own, *experts):
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
        return norm

    def check(self, setting: str = "expert_capacity") -> float:
        """The capacity that calls since the last check needed, at most; every rank calls it, and waits for the device.

        Args:
            setting: what the user calls the capacity.

        Raises:
            UserError: it is more than there is, so that visits of tokens to experts were left out; on every rank.
        """
        mine = torch.cat([*self.loads.values()])
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        for load in self.loads.values():
            load.zero_()
        by_rank = torch.stack(every).cpu()
        worst = float(by_rank.max())
        if worst > self.capacity:
            rank, layer = divmod(int(by_rank.argmax()), len(self.loads))
            most = self.group.size()
            more = f"{worst * 1.2:.2f}, or to {most}" if worst * 1.2 < most else f"{most}"
            raise UserError(
                f"{[*self.loads][layer]}: rank {rank} needed room for {worst:.3f} times its even share of all visits "
                f"to experts and has it for {self.capacity:g}, so visits were left out and what was trained since the "
                f"last check is not right; set {setting} to {more}, which is enough whatever routers do"
            )
        return worst

    def refuse_unfrozen(self) -> None:
        """Refuses weights of experts that were frozen when they were divided and train by now.

        Raises:
            ValueError: with their number; their gradients would lack those of other ranks.
        """
        late = sum(weight.requires_grad and weight not in self.trained for weight in self.parameters)
        if late:
            raise ValueError(
                f"{late} weights of experts train that were frozen when they were divided; unfreeze before"
            )

    def _division(self, weight: Tensor) -> Division | None:
        return self.parameters.get(weight) if isinstance(weight, nn.Parameter) else None


def expert_sizes(model: nn.Module) -> tuple[int, ...]:
    """The numbers of ranks P that can hold a model's experts together, ascending, 1 among them."""
    return common_sizes(_counts(model))


def check_expert_size(model: nn.Module, size: int, capacity: float) -> None:
    """Checks that so many ranks can hold a model's experts together; neither ``prepare`` nor a process group is needed.

    Raises:
        ValueError: a model without experts, or with some that are not known, that is divided already, or whose experts
            are no multiple of ``size``; with the sizes that can be. A capacity below 1.
    """
    if hf_model.is_sharded(model):
        raise ValueError("the model is sharded already; divide experts in the same call")
    others = other_experts(hf_model.text_model(model))
    if others or not any(True for _ in _fused(model)):
        names = ", ".join(others)
        unknown = f"expert={size}: its experts are in a layout that is not known ({names}); leave expert out"
        raise ValueError(unknown if others else no_experts(size))
    if size not in expert_sizes(model):
        raise ValueError(not_divided(size, _counts(model)))
    if capacity < 1:
        raise ValueError(f"expert_capacity={capacity:g}: a rank's even share is 1; set it between 1 and {size}")


def check_expert_ranks(model: nn.Module, size: int, processes: int) -> None:
    """Checks that ``size``, which a model's experts can be divided by, divides the number of processes.

    Raises:
        ValueError: it does not; with the sizes that do.
    """
    if processes % size:
        sizes = ", ".join(str(choice) for choice in expert_sizes(model) if processes % choice == 0)
        raise ValueError(f"expert={size} does not divide {processes} processes; set expert to one of {sizes}")


def divide_experts(
    model: nn.Module,
    mesh: Mesh,
    *,
    capacity: float,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> DividedExperts:
    """Leaves each rank its experts of every layer, in place, and makes layers send tokens to the ranks that hold them.

    ``mesh.expert_size`` neighbours hold all experts together. Where there are more ranks, others hold the same experts.

    Gradients of experts come from the tokens of all ranks of a group. They are summed over the groups in float32, and
    divided by R, as the gradients of all other weights are averaged over R ranks.

    Args:
        model: prepared, adapters included; on its device, or without storage on the meta device.
        mesh: all processes; the sizes are checked. Those that share a pack have as many tokens each.
        capacity: how many times its even share of tokens' visits a rank has room for.
        dtype: what float32 weights of experts are computed with in.
        device: where experts lie that have no storage yet, and get some without values.
    """
    size, device = mesh.expert_size, device or hf_model.device_of(model)
    made = init_device_mesh(device.type, (mesh.size // size, size), mesh_dim_names=(REPLICATE, EXPERT))
    group, replicas = made.get_group(EXPERT), made.get_group(REPLICATE)
    capacity = math.ceil(capacity * CAPACITY_STEPS) / CAPACITY_STEPS
    loads, parameters = dict[str, Tensor](), dict[nn.Parameter, Division]()
    for path, module in _experts(model):
        # not a scalar, which Dynamo takes for a number of Python's in float64 on a CPU, and loses what a graph writes
        load = loads[path] = torch.zeros(1, dtype=torch.float64, device=device)
        held = _count(module) // size
        parameters |= {weight: Division(held * size, innermost=False) for weight in module.parameters(recurse=False)}
        module.__dict__[PART] = ExpertPart(group.group_name, size, group.rank(), held, capacity, load, dtype)
    for wrapper in _wrappers(model):
        held = wrapper.num_experts // size
        for factors, innermost in ((wrapper.lora_A, False), (wrapper.lora_B, True)):
            parameters |= {factor.weight: Division(held * size, innermost) for factor in factors.values()}
        wrapper.num_experts = held
    scale = functools.partial(_of_all_ranks, divisor=mesh.size, replicas=replicas)
    for weight, division in parameters.items():
        part = division.part(weight.data, group.rank(), size)
        if weight.is_meta:
            give_storage(weight, part.shape, device)
        else:
            weight.data = part
        if weight.requires_grad:
            hooked: Any = weight
            hooked.register_hook(scale)
    for wrapper in _wrappers(model):
        for down, up in zip(wrapper.lora_A.values(), wrapper.lora_B.values(), strict=True):
            down.out_features = up.in_features = down.weight.shape[0]
    trained = {weight for weight in parameters if weight.requires_grad}
    return DividedExperts(made, group, capacity, loads, parameters, trained)


def parameters_of_experts(model: nn.Module) -> set[nn.Parameter]:
    """What ``divide_experts`` divides: weights and biases of experts, and their adapters."""
    factors = [pair.values() for wrapper in _wrappers(model) for pair in (wrapper.lora_A, wrapper.lora_B)]
    own = {weight for _, module in _experts(model) for weight in module.parameters(recurse=False)}
    return own | {factor.weight for of_wrapper in factors for factor in of_wrapper}


def replicate_beside(model: nn.Module, parameters: Collection[nn.Parameter]) -> bool:
    """Tells DistributedDataParallel to leave some of a model's weights alone; whether it would train any other."""
    named = {name: weight for name, weight in model.named_parameters() if weight in parameters}
    ddp: Any = DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, [*named])
    return any(weight.requires_grad for weight in model.parameters() if weight not in parameters)


def norm_of(grads: list[Tensor], device: torch.device) -> Tensor:
    """Of gradients on a device, whole; of none a zero that is made there: a copy of one would wait for the device."""
    return whole_tensor(get_total_norm(grads)) if grads else torch.zeros((), device=device)


def _of_all_ranks(grad: Tensor, divisor: int, replicas: ProcessGroup) -> Tensor:
    mine = grad.to(torch.promote_types(grad.dtype, torch.float32)) / divisor
    if replicas.size() > 1:
        dist.all_reduce(mine, group=replicas)
    return mine.to(grad.dtype)


def _experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """By path; each once."""
    for path, module in model.named_modules():
        if isinstance(module, Experts) and experts_layout(module) is not None:
            yield path, module


def _fused(model: nn.Module) -> Iterator[Any]:
    """Experts of known layouts, which ``prepare`` makes ``Experts``."""
    return (module for module in model.modules() if experts_layout(module) is not None)


def _counts(model: nn.Module) -> set[int]:
    """The numbers of experts of its layers."""
    return {_count(module) for module in _fused(model)}


def _wrappers(model: nn.Module) -> Iterator[Any]:
    """PEFT's wrappers around Parameters of experts, whichever adapters are active."""
    for module in model.modules():
        if is_parameter_lora(module):
            inside: Any = module
            while hasattr(inside, "parameter_name"):
                inside = inside.base_layer
            if isinstance(inside, Experts):
                yield module


def _count(module: Any) -> int:
    """X of experts that are whole."""
    return int(module.down_proj.shape[0])
