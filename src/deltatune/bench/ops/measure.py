"""Measures one case: every variant gated, those that pass timed side by side, memory and ceilings beside them."""

from __future__ import annotations

import functools
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltatune.bench.ops.case import Case, Function, Tensors, Variant
from deltatune.bench.ops.gate import Gate, gradient_weights, leaves
from deltatune.bench.protocol import Timing, copy_rate, gemm_rate, measure, peak_bytes

__all__ = ["DIRECTIONS", "measure_case"]

DIRECTIONS: Final = ("forward", "forward+backward")

# Input sets in turn are together larger than the last-level cache of any GPU, so that none is read from it.
_COLD_BYTES: Final = 256 * 2**20
_CALLS: Final = 4


@dataclass
class _Row:
    """What is known of a variant so far."""

    variant: Variant
    status: str = "ok"
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    function: Function | None = None

    def fail(self, status: str, reason: object) -> None:
        self.status, self.function = status, None
        self.reason = " ".join(str(reason).split())[:300] or type(reason).__name__


def measure_case(case: Case, gate_case: Case, device: torch.device, *, rounds: int, seconds: float) -> dict[str, Any]:
    """A record's config: gates, ceilings and results of every variant, those that fail with their reason.

    Args:
        case: what is timed.
        gate_case: the same op at the size that correctness is checked at; may be ``case``.
        device: where.
        rounds: at most so many rounds of samples.
        seconds: about how long one direction's samples may take; three rounds are taken however long.
    """
    rows = [_Row(variant) for variant in case.variants]
    budget = _check(gate_case, rows)
    if gate_case is not case:
        for row, variant in zip(rows, case.variants, strict=True):
            row.function = row.function and _attempt(row, "failed", variant.build)
    sets = _input_sets(case)
    ceilings = _ceilings(case, device)
    results: list[dict[str, Any]] = []
    for what in DIRECTIONS:
        floor = _floor(case, what, ceilings, sets[0])
        results += _timed(case, rows, what, sets, device, floor, rounds=rounds, seconds=seconds)
    return {
        "config": {**case.config, "gate_tokens": gate_case.config["T"]},
        "auto": case.auto,
        "ceilings": ceilings,
        "input_bytes": _bytes_of(sets[0]),
        "errors": {row.variant.name: {k: _finite(e) for k, e in row.errors.items()} for row in rows if row.errors},
        "error_budget": budget,
        "results": results,
    }


def _failures() -> tuple[type[Exception], ...]:
    """What the kernels and compilers of others raise: not one of them may cost the other rows."""
    triton = sys.modules.get("triton")
    named = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, OSError)
    return named if triton is None else (*named, triton.errors.TritonError)


def _attempt(row: _Row, status: str, action: Callable[..., Any], *args: object) -> Any:
    """What the action returns; None where it fails, which the row then says."""
    try:
        return action(*args)
    except _failures() as error:
        row.fail("out_of_memory" if isinstance(error, torch.OutOfMemoryError) else status, error)
        return None


def _check(case: Case, rows: list[_Row]) -> dict[str, float]:
    """Builds and gates every variant; returns the error budget."""
    inputs = case.draw(1)
    gates: dict[bool, Gate] = {True: Gate.of(case, inputs)}
    if any(not row.variant.packed for row in rows):
        gates[False] = Gate.of(case, inputs, packed=False)
    for row, variant in zip(rows, case.variants, strict=True):
        row.function = _attempt(row, "unavailable", variant.build)
        if row.function is not None:
            _attempt(row, "failed", _gate, row, case, gates[variant.packed], inputs)
        _release()
    return dict(gates[True].budget)


def _gate(row: _Row, case: Case, gate: Gate, inputs: Tensors) -> None:
    assert row.function is not None
    row.errors, wrong = gate.check(case, row.function, inputs)
    if wrong is None:
        return
    row.status, row.reason = "red gate", wrong
    if row.variant.by in ("deltatune", "compile"):
        row.function = None  # no time is reported of a wrong answer of ours; of others' it is, beside its status


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _input_sets(case: Case) -> list[dict[str, Tensor]]:
    first = leaves(case.draw(2), case.trained)
    count = max(2, min(8, math.ceil(_COLD_BYTES / _bytes_of(first))))
    return [first, *(leaves(case.draw(seed), case.trained) for seed in range(3, count + 2))]


def _bytes_of(inputs: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in inputs.values())


def _ceilings(case: Case, device: torch.device) -> dict[str, Any]:
    rate = copy_rate(device, case.work.copy_bytes)
    found: dict[str, Any] = {"copy_bytes_per_second": rate, "copy_bytes": case.work.copy_bytes}
    if case.work.gemm is not None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        found |= {"gemm_flops_per_second": gemm_rate(device, *case.work.gemm, dtype), "gemm": list(case.work.gemm)}
    return found


def _floor(case: Case, what: str, ceilings: Mapping[str, Any], inputs: Tensors) -> dict[str, Any]:
    """The fewest bytes and operations of a direction, and the longer of the two times they take."""
    both = what == DIRECTIONS[1]
    num_bytes = case.work.forward_bytes + (case.work.backward_bytes if both else 0)
    found: dict[str, Any] = {"floor_bytes": num_bytes}
    times = [1e3 * num_bytes / ceilings["copy_bytes_per_second"]]
    if case.work.gemm is not None:
        # the formulas registered with our ops: any implementation of ours counts the same
        with FlopCounterMode(display=False) as counter:
            _call(case.reference, case, inputs, what)
        found["floor_flops"] = counter.get_total_flops()
        times.append(1e3 * found["floor_flops"] / ceilings["gemm_flops_per_second"])
    return found | {"floor_ms": max(times)}


def _call(function: Function, case: Case, inputs: Tensors, what: str, grads: list[Tensor] | None = None) -> object:
    """Forward without autograd, or forward and the gradients of what trains."""
    if what == DIRECTIONS[0]:
        with torch.no_grad():
            return function(inputs)
    out = function(inputs)
    outputs = (out,) if isinstance(out, Tensor) else out
    wanted = [inputs[name] for name in case.trained]
    return torch.autograd.grad(outputs, wanted, gradient_weights(outputs) if grads is None else grads)


def _timed(
    case: Case,
    rows: list[_Row],
    what: str,
    sets: list[dict[str, Tensor]],
    device: torch.device,
    floor: dict[str, Any],
    *,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Results of one direction, in the order of the variants."""
    grads = _output_gradients(case, sets[0]) if what == DIRECTIONS[1] else None
    calls: dict[str, Callable[[int], object]] = {}
    peaks: dict[str, int | None] = {}
    for row in rows:
        if row.function is None:
            continue

        def call(i: int, function: Function = row.function) -> object:
            return _call(function, case, sets[i % len(sets)], what, grads)

        # the first call compiles and tunes, the second shows what it needs
        _attempt(row, "failed", call, 0)
        if row.function is not None:
            peaks[row.variant.name] = _attempt(row, "failed", peak_bytes, functools.partial(call, 1), device)
        if row.function is not None:
            calls[row.variant.name] = call
    timings = _measured(calls, device, rounds=rounds, seconds=seconds)
    return [_result(row, what, timings.get(row.variant.name), peaks.get(row.variant.name), floor) for row in rows]


def _output_gradients(case: Case, inputs: Tensors) -> list[Tensor]:
    with torch.no_grad():
        out = case.reference(inputs)
    return gradient_weights((out,) if isinstance(out, Tensor) else out)


def _measured(
    calls: dict[str, Callable[[int], object]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, Timing]:
    if not calls:
        return {}
    probe = measure(calls, device, rounds=1, calls=1, warmup=1)
    round_ms = _CALLS * sum(timing.median_ms for timing in probe.values())
    taken = min(rounds, max(3, round(1e3 * seconds / max(round_ms, 1e-3))))
    return measure(calls, device, rounds=taken, calls=_CALLS, warmup=0)


def _result(row: _Row, what: str, timing: Timing | None, peak: int | None, floor: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "impl": row.variant.name,
        "by": row.variant.by,
        "what": what,
        "status": row.status,
        "reason": row.reason,
    }
    if timing is None:
        return result
    return {**result, **timing.to_dict(), **floor, "of_floor": floor["floor_ms"] / timing.median_ms, "peak_bytes": peak}


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
