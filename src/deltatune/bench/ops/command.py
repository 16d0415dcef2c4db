"""The command: which ops, shapes and token counts; a table for each case, a record for each op."""

from __future__ import annotations

import argparse
import gc
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from deltatune.bench.ops.case import COMPILED, Setting
from deltatune.bench.ops.catalog import OPS, Entry, shape_of
from deltatune.bench.ops.measure import DIRECTIONS, measure_case
from deltatune.bench.protocol import RECORDS, head, write_record
from deltatune.devices import usable_device
from deltatune.errors import UserError
from deltatune.report import table

__all__ = ["METHOD", "add_arguments", "run"]

METHOD: Final = (
    "device time between CUDA events, the queue kept full by a wait on the device before each turn; forward without "
    "autograd; forward+backward with the gradients of activations, weights frozen; variants interleaved, input sets in "
    "turn and together larger than the cache; errors are relative L2 against the reference in float64, of outputs and "
    "of all gradients, those of weights included; the gate is twice error_budget; floor_ms is the longer of two times: "
    "floor_bytes (each input read once, each output written once) at the rate of a copy of copy_bytes, read and "
    "written bytes both counted, and floor_flops (the registered formulas) at the rate of the product gemm, both "
    "measured in the same run; peak_bytes is what a call allocates at its peak beyond its inputs"
)
_CPU_METHOD: Final = "the wall clock of the CPU: for trying the benchmark out, not for figures; otherwise " + METHOD
_WIDTH: Final = 120
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``deltatune bench ops``."""
    parser.add_argument("--op", action="append", choices=list(OPS), help="may be repeated; all by default")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="MODEL",
        help="a model by name, such as qwen3.5-9b; may be repeated; by default those that the targets name",
    )
    parser.add_argument("--tokens", type=int, action="append", metavar="T", help="tokens of a pack; may be repeated")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16", help="bfloat16 by default")
    parser.add_argument("--device", help="cuda by default where there is one")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of four samples at most; 10 by default")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of samples per case and direction, beyond three rounds; 3"
    )
    parser.add_argument(
        "--gate-tokens", type=int, default=16384, metavar="T", help="check correctness at no more tokens than this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the documents' lengths")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help=f"where to; {RECORDS} by default")
    parser.add_argument("--no-record", action="store_true", help="print alone")
    parser.add_argument("--commit", help="of the source, where there is no git history")


def run(args: argparse.Namespace) -> int:
    """Prints tables and writes records; 1 when what ``auto`` takes, or the compiled reference, fails its gate."""
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting(device, _DTYPES[args.dtype], args.seed)
    ok = True
    for op in args.op or OPS:
        configs = _configs(op, OPS[op], setting, args)
        method = METHOD if device.type == "cuda" else _CPU_METHOD
        green = all(_green(config) for config in configs)
        top = head(f"ops/{op}", op, method, device, argv=args.argv, commit=args.commit)
        record = top | {"ok": green, "configs": configs}
        ok = ok and green
        if configs and not args.no_record:
            sys.stdout.write(f"{write_record(record, args.records)}\n\n")
    return 0 if ok else 1


def _configs(op: str, entry: Entry, setting: Setting, args: argparse.Namespace) -> list[dict[str, Any]]:
    configs = []
    for name in args.shape or entry.shapes:
        shape = shape_of(name)
        if entry.hybrid and not shape.hybrid:
            sys.stdout.write(f"{op}: {name} has none\n\n")
            continue
        for tokens in args.tokens or entry.tokens:
            if tokens < 1 or args.gate_tokens < 1:
                raise UserError(f"tokens must be at least 1, got {min(tokens, args.gate_tokens)}")
            configs.append(_config(entry, shape.name, tokens, setting, args))
            sys.stdout.write("\n".join(lines(op, configs[-1])) + "\n\n")
            sys.stdout.flush()
    return configs


def _config(entry: Entry, name: str, tokens: int, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    # graphs of another shape would count against the recompile limit of the same code
    torch.compiler.reset()
    gc.collect()
    case = entry.build(shape_of(name), tokens, setting)
    gated = case if tokens <= args.gate_tokens else entry.build(shape_of(name), args.gate_tokens, setting)
    return measure_case(case, gated, setting.device, rounds=args.rounds, seconds=args.seconds)


def _green(config: dict[str, Any]) -> bool:
    """Whether what a run would take passed; what must be named may be less exact, and its row says so."""
    taken = (config["auto"], COMPILED)
    return not any(result["status"] == "red gate" for result in config["results"] if result["impl"] in taken)


def lines(op: str, config: dict[str, Any]) -> list[str]:
    """A printed table of one case, and below it why a row has no figures or should not be trusted."""
    sizes = ", ".join(f"{name} {value}" for name, value in config["config"].items() if not isinstance(value, list))
    ceilings = config["ceilings"]
    speeds = [f"copy {ceilings['copy_bytes_per_second'] / 1e9:.0f} GB/s"]
    if "gemm_flops_per_second" in ceilings:
        speeds.append(f"GEMM {ceilings['gemm_flops_per_second'] / 1e12:.1f} TFLOP/s")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in config["results"]:
        by_name.setdefault(result["impl"], []).append(result)
    header = ("", *(word for what in DIRECTIONS for word in (f"{what} ms", "of floor", "MiB")), "error/budget", "")
    rows = [_row(name, results, config) for name, results in by_name.items()]
    about = [f"{op}: {sizes}", f"{', '.join(speeds)}; auto takes {config['auto']}", ""]
    return [*about, *table(header, rows), *_reasons(by_name)]


def _reasons(by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """In full, as the record has them, wrapped; one that both directions give once."""
    for name, results in by_name.items():
        for said in dict.fromkeys((r["status"], r["reason"]) for r in results if r["status"] != "ok"):
            text = f"{name}: {said[0]}: {said[1]}"
            yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False)


def _row(name: str, results: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    cells = [name]
    for result in results:
        timed = "median_ms" in result
        peak = result.get("peak_bytes")
        cells += [
            f"{result['median_ms']:.3f}" if timed else "-",
            f"{result['of_floor']:.0%}" if timed else "-",
            f"{peak / 2**20:.0f}" if peak is not None else "-",
        ]
    errors = config["errors"].get(name, {})
    worst = max((_ratio(error, config["error_budget"][key]) for key, error in errors.items()), default=None)
    status = results[-1]["status"]
    return [*cells, "-" if worst is None else f"{worst:.2f}", "" if status == "ok" else status]


def _ratio(error: float | None, budget: float) -> float:
    return float("inf") if error is None or (budget == 0 and error > 0) else error / max(budget, 1e-300)
