"""Every op at the shapes of models: checked against the reference in float64, then timed; a record an op.

    python -m benchmarks.ops                      # every op at the shapes of 2B and 9B models
    python -m benchmarks.ops --op causal_conv --shape qwen3.5-27b --tokens 32768 --output out

Outputs and all gradients of a variant may have twice the error of the reference at the same dtype. What is ours, or
the compiled reference, is not timed behind a red check; others are, and the record says so. Forward alone and with
backward, variants interleaved, inputs cold. Exit status 1 where what ``auto`` takes is not exact enough.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import deltatune
from benchmarks.op_cases import CASES, Case, Function, Run, Tensors, Variant
from benchmarks.records import RECORDS, head, source_of, write_record
from benchmarks.shapes import shape_named
from benchmarks.timing import copy_rate, gemm_rate, measure, num_sets, peak_bytes, summary
from benchmarks.worker import failures, outcome_of
from deltatune import ops

__all__ = ["main", "measure_case"]

_METHOD: Final = (
    "device time between CUDA events (the wall clock on a CPU), the queue kept full by a wait on the device before "
    "each turn; forward without autograd; forward+backward with the gradients of activations, weights frozen, where "
    "there are activations; "
    "variants interleaved, input sets in turn and together larger than the cache; errors are relative L2 against the "
    "reference in float64, of outputs and of all gradients; the check is twice error_budget; bound_ms is the longer "
    "of bound_bytes (each input read once, each output written once) at the rate of a copy of that size and "
    "bound_flops (the registered formulas) at the rate of the product gemm, both measured in the same run; "
    "peak_bytes is what a call allocates at its peak beyond its inputs"
)
_DIRECTIONS: Final = ("forward", "forward+backward")
_ALLOWED: Final = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables and writes records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", default=list(CASES), choices=list(CASES), metavar="OP", help=", ".join(CASES))
    add("--shape", nargs="+", metavar="MODEL", help="such as qwen3.5-9b; each op has its own by default")
    add("--tokens", nargs="+", type=int, metavar="T", help="of a pack; each op has its own by default")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=3.0, help="of samples for a case and direction, beyond three rounds; 3")
    add("--commit", metavar="HASH", help="of the source, where it lies without its history")
    add("--output", type=Path, default=RECORDS, metavar="DIR", help="benchmarks/records by default")
    args = parser.parse_args(argv)
    run, ok = Run(torch.device(args.device), getattr(torch, args.dtype)), True
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    for op in args.op:
        configs = []
        for shape in args.shape or CASES[op].shapes:
            for tokens in args.tokens or CASES[op].tokens:
                if not CASES[op].hybrid or shape_named(shape).hybrid:
                    configs.append(_config(op, shape, tokens, run, seconds=args.seconds))
                    sys.stdout.write("\n".join([f"{op} on {name}", *lines(configs[-1]), ""]) + "\n")
                    sys.stdout.flush()
        green = all(config["ok"] for config in configs)
        ok = ok and green
        source = source_of(Path(deltatune.__file__).parent, args.commit)
        record = head(f"ops/{op}", op, _METHOD, device=name, source=source) | {"ok": green, "configs": configs}
        if configs:
            sys.stdout.write(f"{write_record(record, args.output)}\n\n")
    return 0 if ok else 1


def _config(op: str, shape: str, tokens: int, run: Run, *, seconds: float) -> dict[str, Any]:
    # graphs of another shape would count against the recompile limit of the same code
    torch.compiler.reset()
    gc.collect()
    case = CASES[op].build(shape_named(shape), tokens, run)
    about = {"model": shape, "T": tokens, **case.config, "dtype": str(run.dtype).removeprefix("torch.")}
    found = {"config": {**about, "lengths": run.lengths(tokens)}, **measure_case(case, run, seconds=seconds)}
    taken = [r for r in found["results"] if r["impl"] in (found["auto"], "torch.compile(reference)")]
    return {**found, "ok": not any(r["status"] == "red check" for r in taken)}


@dataclass
class _Row:
    """What is known of a variant so far."""

    variant: Variant
    status: str = "ok"
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    function: Function | None = None

    def attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        """What the action returns; None where it fails, which the row then says."""
        try:
            return action(*args)
        except failures() as error:
            self.status, self.reason = outcome_of(error)
            self.function = None
            return None


def measure_case(case: Case, run: Run, *, seconds: float) -> dict[str, Any]:
    """A record's config: checks, ceilings and results of every variant, those that fail with their reason."""
    rows = {name: _Row(variant) for name, variant in case.variants.items()}
    budget = _check(case, rows)
    sets = [_leaves(case.draw(2), case.trained)]
    size = sum(x.numel() * x.element_size() for x in sets[0].values())
    sets += [_leaves(case.draw(seed), case.trained) for seed in range(3, 2 + min(8, num_sets(size)))]
    rates: dict[str, Any] = {"copy_bytes_per_second": copy_rate(run.device, case.forward_bytes // 2)}
    if case.gemm is not None:
        side = case.gemm if run.device.type == "cuda" else (64, 64, 64)
        rates |= {"gemm_flops_per_second": gemm_rate(run.device, *side, run.dtype), "gemm": list(side)}
    directions = _DIRECTIONS if case.trained else _DIRECTIONS[:1]
    results = [result for what in directions for result in _timed(case, rows, what, sets, run, rates, seconds)]
    errors = {name: {k: e if math.isfinite(e) else None for k, e in row.errors.items()} for name, row in rows.items()}
    spec = next(spec for spec in ops.Spec.__subclasses__() if spec.op == case.op)
    return {
        "auto": ops.choose(spec(run.device, run.dtype, **case.choice)).impl,
        "ceilings": rates,
        "input_bytes": size,
        "errors": {name: found for name, found in errors.items() if found},
        "error_budget": budget,
        "results": results,
    }


def _check(case: Case, rows: Mapping[str, _Row]) -> dict[str, float]:
    """Builds and checks every variant; returns the budget."""
    inputs, wanted = case.draw(1), (*case.trained, *case.checked)
    double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}

    def errors(function: Function, given: Tensors, exact: Tensors) -> dict[str, float]:
        return _errors(_results(function, given, case.outputs, wanted), exact)

    exact = {True: _results(case.reference, double, case.outputs, wanted)}
    if case.unpacked is not None:
        exact[False] = _results(case.unpacked, double, case.outputs, wanted)
    del double
    budget = case.budget(inputs, exact[True], errors) if case.budget else errors(case.reference, inputs, exact[True])
    for row in rows.values():
        row.function = row.attempt(row.variant.build)
        if row.function is not None:
            row.errors = row.attempt(errors, row.function, inputs, exact[row.variant.packed]) or {}
        # NaN compares as False, so that it is over
        over = [name for name, error in row.errors.items() if not error <= _ALLOWED * budget[name]]
        if over:
            parts = (f"{name} {row.errors[name]:.1e}, allowed {_ALLOWED * budget[name]:.1e}" for name in over)
            row.status, row.reason = "red check", f"relative error of {'; '.join(parts)}"
            if row.variant.by in ("deltatune", "compile"):
                row.function = None  # no time is reported of a wrong answer of ours
        gc.collect()
    return budget


def _results(function: Function, inputs: Tensors, outputs: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The outputs by name, and the gradients of a weighted sum of them as ``d<input>``."""
    given = _leaves(inputs, wanted)
    found = _tuple(function(given))
    leaves = [given[name] for name in wanted]
    grads = torch.autograd.grad(found, leaves, _gradient_weights(found)) if leaves else ()
    named = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {name: x.detach() for name, x in zip(outputs, found, strict=True)} | named


def _leaves(inputs: Tensors, wanted: Sequence[str]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def _gradient_weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed gradients of the outputs: the same numbers whatever the dtype; 1 for a scalar."""
    found = []
    for seed, x in enumerate(outputs, start=1):
        generator = torch.Generator(x.device).manual_seed(seed)
        values = torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)
        found.append(torch.ones_like(x) if x.ndim == 0 else values)
    return found


def _errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    """``|found - exact| / |exact|`` in the L2 norm, by name; infinite where something is not a number."""
    pairs = ((name, float((found[name].double() - x).norm() / x.norm())) for name, x in exact.items())
    return {name: error if math.isfinite(error) else math.inf for name, error in pairs}


def _timed(
    case: Case,
    rows: Mapping[str, _Row],
    what: str,
    sets: Sequence[Tensors],
    run: Run,
    rates: Mapping[str, Any],
    seconds: float,
) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[int], object]] = {}
    peaks: dict[str, int | None] = {}
    with torch.no_grad():
        grads = _gradient_weights(_tuple(case.reference(sets[0])))
    for name, row in rows.items():
        if row.function is None or not row.variant.timed:
            continue

        def call(i: int, function: Function = row.function) -> object:
            return _call(function, case, sets[i % len(sets)], what, grads)

        # the first call compiles and tunes, the second shows what it needs
        row.attempt(call, 0)
        if row.function is not None:
            peaks[name] = row.attempt(peak_bytes, lambda call=call: call(1), run.device)
        if row.function is not None:
            calls[name] = call
    probe = measure(calls, run.device, rounds=1, calls=1, warmup=1)
    round_ms = 4 * sum(statistics.median(samples) for samples in probe.values())
    rounds = min(10, max(3, round(1e3 * seconds / max(round_ms, 1e-3))))
    samples = measure(calls, run.device, rounds=rounds, warmup=0)
    least = _least(case, what, sets[0], rates)
    results = []
    for name, row in rows.items():
        plain: dict[str, Any] = {"impl": name, "by": row.variant.by, "what": what}
        plain |= {"status": row.status, "reason": row.reason}
        if name in samples:
            times = summary(samples[name])
            share = least["bound_ms"] / times["median_ms"]
            plain |= {**times, **least, "of_bound": share, "peak_bytes": peaks[name]}
        results.append(plain)
    return results


def _call(function: Function, case: Case, inputs: Tensors, what: str, grads: Sequence[Tensor]) -> object:
    """Forward without autograd, or forward and the gradients of what trains."""
    if what == _DIRECTIONS[0]:
        with torch.no_grad():
            return function(inputs)
    return torch.autograd.grad(_tuple(function(inputs)), [inputs[name] for name in case.trained], grads)


def _least(case: Case, what: str, inputs: Tensors, rates: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest bytes and operations of a direction, and the longer of the two times they take."""
    num_bytes = case.forward_bytes + (case.backward_bytes if what == _DIRECTIONS[1] else 0)
    found: dict[str, Any] = {"bound_bytes": num_bytes}
    times = [1e3 * num_bytes / rates["copy_bytes_per_second"]]
    if case.gemm is not None:
        with torch.no_grad():
            outputs = _tuple(case.reference(inputs))
        with FlopCounterMode(display=False) as counter:
            _call(case.reference, case, inputs, what, _gradient_weights(outputs))
        found["bound_flops"] = counter.get_total_flops()
        times.append(1e3 * found["bound_flops"] / rates["gemm_flops_per_second"])
    return found | {"bound_ms": max(times)}


def lines(config: Mapping[str, Any]) -> list[str]:
    """A table for a terminal."""
    about = {name: value for name, value in config["config"].items() if name != "lengths"}
    found = [f"{about}; auto takes {config['auto']}", f"{'':40}{'fwd ms':>9}{'bound':>7}{'f+b ms':>9}{'bound':>7}  MiB"]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in config["results"]:
        rows.setdefault(result["impl"], []).append(result)
    for name, both in rows.items():
        cells = "".join(f"{r['median_ms']:9.3f}{r['of_bound']:7.0%}" for r in both if "median_ms" in r)
        peak = both[-1].get("peak_bytes")
        note = "" if both[-1]["status"] == "ok" else f"  {both[-1]['status']}: {both[-1]['reason']}"
        found.append(f"{name:40}{cells}{f'  {peak / 2**20:.0f}' if peak else ''}{note}")
    return found


if __name__ == "__main__":
    sys.exit(main())
