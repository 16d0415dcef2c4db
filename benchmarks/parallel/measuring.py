"""The time, memory and communication of a step on one GPU or on all ranks, as a line of a record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

import torch

from benchmarks.parallel.meeting import Meeting
from benchmarks.parallel.model import Trained, built, packs_of
from benchmarks.parallel.spec import Item, Spec
from benchmarks.parallel.systems import SYSTEMS
from benchmarks.shapes import shape_named
from benchmarks.systems import Packs, pinned
from benchmarks.timing import between_ms, mark, summary, synchronize
from deltatune.errors import UserError

__all__ = ["EXCHANGE", "STATES", "kinds_of", "measured"]

#: Name of what Ulysses does -> in the names of kernels that do it.
EXCHANGE: Final = "all-to-all"
#: Name of what hands states round.
STATES: Final = "all-gather"
_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    EXCHANGE: ("SendRecv", "AllToAll", "all_to_all", "alltoall"),
    "all-reduce": ("AllReduce", "all_reduce", "allreduce"),
    STATES: ("AllGather", "all_gather", "allgather"),
    "reduce-scatter": ("ReduceScatter", "reduce_scatter"),
    "broadcast": ("Broadcast", "broadcast"),
}


def measured(spec: Spec, item: Item, device: torch.device, meeting: Meeting, say: Any) -> dict[str, Any]:
    """The keys of a line; where the item is of one GPU rank 0 alone calls this, else every rank does."""
    system, size = SYSTEMS[item.system], item.gpus
    alone = size == 1
    rank = 0 if alone else meeting.rank
    held = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    began = time.perf_counter()
    trained = Trained(spec, system, built(spec, system, device), rank, size)
    synchronize(device)
    say(f"{item.name}: built in {time.perf_counter() - began:.1f} s ({held:.1f} GiB were held before)")
    packs = packs_of(spec, system, item.tokens, shape_named(spec.model).values["vocab_size"])
    found: dict[str, Any] = {
        "tokens_per_step": item.tokens * (1 if system.shares_pack else size),
        "checkpointing": trained.checkpointing,
        "trainable_parameters": sum(trained.parts.shape(p).numel() for _, p in trained.trained),
    }
    found |= _first(spec, trained, packs, began, spec.packs if alone and not system.shares_pack else 1)
    say(f"{item.name}: first step {found['first_step_seconds']:.1f} s after building began")

    def gathered(value: Any) -> list[Any]:
        return [value] if alone else meeting.gather(value)

    found["first_losses"] = [sum(each) for each in zip(*gathered(found["first_losses"]), strict=True)]
    for key in ("first_step_seconds", "since_start_seconds"):
        found[key] = max(gathered(found[key]))
    if spec.steps:
        found |= _timed(spec, trained, packs, gathered, found["tokens_per_step"])
        say(f"{item.name}: {found['median_ms']:.1f} ms a step")
        if not alone:
            found |= _communication(trained, packs, gathered)
            found |= _room(trained) if system.experts else {}
    return found | _compiler(trained)


def _room(trained: Trained) -> dict[str, Any]:
    try:
        return {"expert_capacity_needed": trained.parts.check()}
    except UserError as error:
        # a fault of what was timed, not a setting that is refused
        raise RuntimeError(f"visits to experts were left out of what was timed: {error}") from error


def _first(spec: Spec, trained: Trained, packs: Packs, began: float, count: int) -> dict[str, Any]:
    """The first step; the loss and the gradient norm of its packs, of the first, the first two and so on."""
    losses, norms = [], []
    found: dict[str, Any] = {}
    for number in range(count):
        losses.append(float(trained.backward(trained.batch(packs, number), trained.targets(packs))))
        norms.append(trained.gradient_norm() / (number + 1))
        if not number:
            trained.optimizer.step()
            synchronize(trained.device)
            found["first_step_seconds"] = time.perf_counter() - began
            found["since_start_seconds"] = time.time() - spec.started
    trained.optimizer.zero_grad(set_to_none=True)
    means = [sum(losses[: number + 1]) / (number + 1) for number in range(count)]
    return found | {"first_losses": means, "first_norms": norms}


def _timed(spec: Spec, trained: Trained, packs: Packs, gathered: Any, tokens: int) -> dict[str, Any]:
    """A sample is the time between the ends of two steps, of the rank that took longest.

    The first step has warmed up what a long one needs; ``spec.seconds`` bounds the samples of long ones, of which
    there are two at least, the first from an empty queue: what a launch adds to so long a step is nothing.
    """
    device = trained.device
    _forget_peak(device)
    gathered(None)
    taken = _laps(trained, packs, range(1), first=True)
    one = max(gathered(taken[0])) / 1e3
    steps = max(2, min(spec.steps, round(spec.seconds / one)))
    gathered(None)
    if one > spec.seconds / 3:
        taken += _laps(trained, packs, range(1, steps), first=True)
    else:
        _laps(trained, packs, range(1, spec.warmup), first=True)
        _forget_peak(device)
        gathered(None)
        taken = _laps(trained, packs, range(spec.warmup, spec.warmup + steps + 1), first=False)
    by_rank = gathered(taken)
    peaks = gathered(torch.cuda.max_memory_allocated() if device.type == "cuda" else None)
    times = summary(max(samples) for samples in zip(*by_rank, strict=True))
    seconds = times["median_ms"] / 1e3
    return {
        **times,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": tokens / seconds / trained.size,
        "peak_bytes": max(peaks) if device.type == "cuda" else None,
        "peak_bytes_by_rank": peaks,
    }


def _laps(trained: Trained, packs: Packs, numbers: range, *, first: bool) -> list[float]:
    """Ms from the end of one step to that of the next; ``first``: also of the first, from an empty queue."""
    device, targets = trained.device, trained.targets(packs)
    batches = [trained.batch(packs, number) for number in numbers]
    batches = [pinned(batch) if device.type == "cuda" else batch for batch in batches]
    synchronize(device)
    marks = [mark(device)] if first else []
    for batch in batches:
        trained.step(batch, targets)
        marks.append(mark(device))
    synchronize(device)
    return [between_ms(*pair) for pair in pairwise(marks)]


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def kinds_of(rows: Mapping[str, float]) -> dict[str, float]:
    """Ms of kernels by name -> ms of each kind of communication."""
    found: dict[str, float] = {}
    for name, ms in rows.items():
        kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), None)
        if kind is not None and ms:
            found[kind] = found.get(kind, 0.0) + ms
    return found


def _communication(trained: Trained, packs: Packs, gathered: Any) -> dict[str, Any]:
    """Kernels of communication in one step of each rank, waiting for others included, and what the host waited for."""
    from torch.profiler import ProfilerActivity, profile

    device, targets = trained.device, trained.targets(packs)
    cuda = device.type == "cuda"
    batch = trained.batch(packs, 0)
    batch = pinned(batch) if cuda else batch
    synchronize(device)
    gathered(None)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        begin = mark(device)
        waits = _waits(lambda: trained.step(batch, targets), device)
        end = mark(device)
        synchronize(device)
    by_rank = gathered(kinds_of(_kernels(profiler) if cuda else _collectives(profiler)))
    exchanges = (EXCHANGE, STATES) if trained.system.states else (EXCHANGE,)
    exchange = [sum(kinds.get(kind, 0.0) for kind in exchanges) for kinds in by_rank]
    longest = max(gathered(between_ms(begin, end)))
    waited = gathered(waits)
    return {
        "profiled_step_ms": longest,
        "communication_ms_by_rank": by_rank,
        "exchange_ms": sum(exchange) / len(exchange),
        "host_syncs": max(len(each) for each in waited) if cuda else None,
        "host_waits": sorted({one for each in waited for one in each})[:5],
    }


def _kernels(profiler: Any) -> dict[str, float]:
    """Ms of each kernel by name; a collective's annotation lasts as long as its kernel."""
    events = profiler.key_averages()
    return {event.key: event.self_device_time_total / 1e3 for event in events if "Kernel" in event.key}


def _collectives(profiler: Any) -> dict[str, float]:
    """Ms of each collective on a CPU by name; averages of all ops there take longer to make than the step took."""
    rows: dict[str, float] = {}
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith(("c10d::", "gloo:")):
            rows[event.name()] = rows.get(event.name(), 0.0) + event.duration_ns() / 1e6
    return rows


def _waits(call: Callable[[], None], device: torch.device) -> list[str]:
    """What made the host wait for the device; a rank that raised instead would leave the others in a collective."""
    if device.type != "cuda":
        call()
        return []
    cuda: Any = torch.cuda
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            cuda.set_sync_debug_mode("default")
    # not what the first call in a process says of the mode itself
    return [str(one.message).splitlines()[0][:200] for one in said if "called a synchronizing" in str(one.message)]


def _compiler(trained: Trained) -> dict[str, Any]:
    compiled = trained.prepared.compile_report
    report = trained.prepared.report
    return {
        "kernels": {row.op: row.impl for row in report.kernels},
        "lora_layers": report.to_dict().get("lora_layers"),
        "compile_seconds": compiled.seconds if compiled else None,
        "graphs": dict(compiled.graphs) if compiled else None,
        "breaks": len(compiled.breaks) if compiled else None,
        "recompiles": len(compiled.recompiles) if compiled else None,
    }
