"""A model as a system trains it, divided or on one GPU, its packs and its step."""

# T tokens of a pack

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.parallel.spec import Spec
from benchmarks.parallel.systems import System
from benchmarks.shapes import Shape, adapters, build_model, shape_named, with_lora
from benchmarks.systems import Batch, Packs, moved
from deltatune import CompileOptions, Prepared, prepare
from deltatune.parallel.sharding import full_precision_parameters
from deltatune.parallel.state import SHARDS, whole_tensor
from deltatune.parallel.stepping import step_kinds_apart

__all__ = ["Trained", "built", "num_targets", "packs_of", "shallow_shape", "through"]

_LEAST_LAYERS: Final = 4
_FEW_TOKENS: Final = 4096
#: Of a pack of whole documents, equal: up to so many ranks share it.
_PARTS: Final = 8


def shallow_shape(spec: Spec) -> Shape:
    """The model's widths with a small vocabulary, for the check."""
    shape = shape_named(spec.model)
    vocab = min(_FEW_TOKENS, int(shape.values["vocab_size"]))
    return replace(shape, values={**shape.values, "vocab_size": vocab})


def built(spec: Spec, system: System, device: torch.device, *, shape: Shape | None = None) -> Any:
    """The stock model with random weights, with adapters where they alone train; the same values on every rank.

    Weights that all train are float32 and hold what the activations' dtype can, so that a cast changes none.
    """
    layers = spec.layers if shape is None else _LEAST_LAYERS
    dtype = getattr(torch, spec.dtype)
    model = build_model(shape or shape_named(spec.model), device, layers=layers, dtype=dtype, seed=spec.seed)
    if not system.full:
        targets = "experts" if system.experts else "qkvo"
        return with_lora(model, targets, rank=spec.rank, alpha=2 * spec.rank, seed=spec.seed)
    return model.float()


@torch.no_grad()
def through(prepared: Prepared, dtype: torch.dtype) -> None:
    """Casts float32 weights as sharded ones are gathered: all but those that layers want in float32."""
    kept = full_precision_parameters(prepared.model)
    for parameter in prepared.model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)


def packs_of(spec: Spec, system: System, tokens: int, vocab_size: int) -> Packs:
    """One document where ranks share a pack, unless they share short ones; else 64 to 2048 tokens each."""
    return Packs(tuple(system.lengths(tokens, _PARTS, spec.seed)), vocab_size, spec.seed)


def num_targets(packs: Packs) -> int:
    """Of each pack: every token but the first of its document."""
    return sum(packs.lengths) - len(packs.lengths)


class Trained:
    """A model on one GPU, or divided among all ranks, with its optimizer at learning rate 0."""

    def __init__(self, spec: Spec, system: System, model: Any, rank: int, size: int, *, compiled: bool = True) -> None:
        """``model`` as ``built`` made it; ``rank`` of ``size`` that the step is divided among."""
        self.system, self.rank, self.size = system, rank, size
        self.device: torch.device = next(model.parameters()).device
        backend = spec.backend if compiled else "none"
        options = {"none": None, "aot_eager": CompileOptions(backend="aot_eager")}.get(backend, CompileOptions())
        how = system.checkpointing if spec.checkpointing is None else spec.checkpointing
        # without compile a share of the activations is none
        self.checkpointing = how if options is not None or how in ("none", "layer") else "layer"
        self.prepared = prepare(model, compile=options, checkpointing=self.checkpointing)
        dtype = getattr(torch, spec.dtype)
        param_dtype = dtype if system.full and dtype != torch.float32 else None
        divide = system.divide if size > 1 else system.alone
        divided = divide(self.prepared, param_dtype)
        self.model: nn.Module = divided.model
        self.parts = divided.parts
        self.trained = adapters(self.prepared.model)
        self.optimizer = torch.optim.AdamW([p for _, p in self.trained], lr=0.0, fused=True)
        if self.parts is not SHARDS:  # experts beside shards
            step_kinds_apart(self.optimizer)

    def batch(self, packs: Packs, number: int) -> Batch:
        """This rank's part of a step on the CPU: of pack ``number``, or pack ``number * size + rank``."""
        if self.system.shares_pack:
            return self.system.part(packs.batch(number), self.rank, self.size)
        return packs.batch(number * self.size + self.rank)

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """Adds the gradients of a step's mean loss; returns this rank's part of that loss, on the device.

        Args:
            batch: this rank's.
            targets: of all ranks together.
        """
        call = {name: value for name, value in moved(batch, self.device).items() if name in _CALL}
        loss: Tensor = self.model(**call, num_items_in_batch=targets).loss
        # what divides the model averages over its ranks
        torch.autograd.backward(loss * self.size)
        return loss.detach()

    def targets(self, packs: Packs) -> int:
        """Of a step of all ranks."""
        return num_targets(packs) * (1 if self.system.shares_pack else self.size)

    def step(self, batch: Batch, targets: int) -> None:
        """The batch to the device, forward, loss, backward, optimizer."""
        self.backward(batch, targets)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Over all ranks, whole; gradients stay as they are."""
        return float(self.parts.clip_grad_norm_(self.prepared.model, math.inf))

    def gradients(self) -> Mapping[str, Tensor]:
        """Whole ones by name, float32, on the device; every rank calls it. Zero where there is none."""
        found = {}
        for name, parameter in self.trained:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            whole = whole_tensor(self.parts.saved(gradient, parameter))
            found[name] = whole.detach().float().view(self.parts.shape(parameter))
        return found


_CALL: Final = ("input_ids", "position_ids", "sequences", "labels", "shift_labels")
