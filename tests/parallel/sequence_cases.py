"""Packs that ranks of a sequence group hold together, and what one process makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from deltatune import CompileOptions, Sequences, prepare
from deltatune.packing.group import Recurrent
from deltatune.parallel.sequence import shard_sequence
from deltatune.parallel.slice import cut_batch
from tiny import documents, tiny_conditional, tiny_model

TRACED = CompileOptions(backend="aot_eager")
COLLECTIVES = {"_c10d_functional::all_to_all_single", "_c10d_functional::all_gather_into_tensor"}
#: of Qwen3.5's layers, wide enough to be cut at 513
THREE, ODD = [37, 51, 40], [13, 1, 2, 3, 70]


@dataclass(frozen=True)
class Case:
    """A model, its preparation and the lengths of the documents in each of its packs."""

    packs: tuple[list[int], ...]
    family: str = "qwen3_5"
    total: int | None = None
    layers: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    images: bool = False  # the model has a vision tower, and the packs are text
    labels: bool = False  # of the rank alone, in place of targets
    counted: bool = True  # the call says how many targets there are
    recurrent: Recurrent = "heads"
    wrapped: bool = False  # another tool put a forward on the instance that calls ours, as accelerate does
    exchanges: bool = False  # how often it exchanges is counted


def pack(lengths: list[int], total: int | None = None, seed: int = 0) -> dict[str, Any]:
    tokens = torch.cat(documents(lengths, seed=seed))
    total = sum(lengths) if total is None else total
    tokens = F.pad(tokens, (0, total - len(tokens)))
    labels = tokens.masked_fill(torch.arange(total) >= sum(lengths), -100)
    return {
        "input_ids": tokens[None],
        "labels": labels[None],
        "sequences": Sequences.from_lengths(lengths, total=total),
    }


def targets_of(batch: dict[str, Any]) -> int:
    trained = (batch["labels"][0] != -100) & (batch["sequences"].positions != 0)
    return max(int(trained.sum()), 1)


def build(case: Case) -> Any:
    made = tiny_conditional if case.images else tiny_model
    model = made(case.family, layers=case.layers, **case.model)
    if not case.lora:
        return model.train()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(0.1 * noise)
    return model.train()


def step(model: Any, case: Case, index: int, part: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Loss, gradients and what the router's loss was, of one pack or of a rank's part of it."""
    whole = pack(case.packs[index], case.total, seed=index)
    batch = whole
    if part is not None:
        batch = cut_batch(whole, rank=part[0], size=part[1])
        tokens = batch["input_ids"].shape[1]
        added = tokens * part[1] - whole["labels"].shape[1]
        if case.labels:  # with those of documents' first tokens, which are nobody's targets
            batch["labels"] = F.pad(whole["labels"], (0, added), value=-100)[:, part[0] * tokens :][:, :tokens]
        batch.pop("shift_labels" if case.labels else "labels")
    counted = {"num_items_in_batch": targets_of(whole)} if case.counted else {}
    model.zero_grad(set_to_none=True)
    output = model(**batch, **counted, **case.call)
    output.loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    found["loss"] = output.loss.detach().clone()
    if part is not None:
        for value in found.values():
            dist.all_reduce(value)
    if getattr(output, "aux_loss", None) is not None:
        found["aux_loss"] = output.aux_loss.detach().clone()
    return found


def alone(case: Case) -> list[dict[str, torch.Tensor]]:
    """Every pack on one process, eager."""
    model = build(case)
    prepare(model)
    return [step(model, case, index) for index in range(len(case.packs))]


def together(case: Case, rank: int, size: int) -> dict[str, Any]:
    """Every pack on all ranks, how often they exchange in one, and what the compiler did."""
    model = build(case)
    prepared = prepare(model, **case.prepared)
    shard_sequence(prepared, dist.group.WORLD, recurrent=case.recurrent)
    if case.wrapped:
        model.forward = passing_on(model.forward)
    found = [step(model, case, index, (rank, size)) for index in range(len(case.packs))]
    report = prepared.compile_report
    return {
        "steps": found,
        "exchanges": exchanges(model, case, rank, size) if case.exchanges else [],
        "report": {} if report is None else report.to_dict(),
    }


def exchanges(model: Any, case: Case, rank: int, size: int) -> list[int]:
    """The collectives of a forward and of its backward."""
    part = cut_batch(pack(case.packs[0], case.total), rank=rank, size=size)
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss = model(**part, num_items_in_batch=100).loss
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        loss.backward()
    return [sum(event.count for event in run.key_averages() if event.key in COLLECTIVES) for run in (forward, backward)]


def passing_on(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return forward


def join(port: int, rank: int, size: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
