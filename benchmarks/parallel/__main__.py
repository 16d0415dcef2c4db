"""Training steps on several GPUs of one machine, each system checked against one process, then timed on 1 and on N.

    python -m benchmarks.parallel --gpus 1 2 --model qwen3.5-2b --output out
    python -m benchmarks.parallel --gpus 1 2 4 8 --systems ddp-lora fsdp-full --model qwen3.5-9b:16

Systems are those of ``benchmarks.parallel.systems``. Each has ranks of its own; a rank that fails or hangs costs the
setting it was in, and its log is kept next to the record. ``--cold-start`` adds first steps with empty caches of every
compiler. ``--limit-s`` bounds the whole invocation, ``--timeout-s`` one setting. ``--device cpu --model tiny`` runs
anywhere. Exit status 1 where a check is red or a setting was not timed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel.session import Session, say
from benchmarks.parallel.spec import Spec
from benchmarks.parallel.systems import SYSTEMS
from benchmarks.records import RECORDS
from benchmarks.shapes import SHAPES, shape_named
from benchmarks.train import checkpointing

__all__ = ["main", "table"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every model, writes a record for each and prints its table."""
    args = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return _measured(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _measured(args: argparse.Namespace) -> int:
    ends, ok = time.monotonic() + args.limit_s, True
    gpus = sorted(set(args.gpus))
    tokens = {name: args.documents if one.shares_pack else args.tokens for name, one in SYSTEMS.items()}
    for spec in _specs(args, max(gpus)):
        left = ends - time.monotonic()
        session = Session(
            spec, checks=not args.no_checks, limit_seconds=left, timeout_s=args.timeout_s, folder=args.output
        )
        interrupted = True
        try:
            session.run(args.systems or _systems_of(spec.model), gpus, tokens, cold=args.cold_start)
            interrupted = False
        finally:  # what has been measured is kept, whatever comes after it
            record = session.record(commit=args.commit, interrupted=interrupted, gpus=gpus)
            path = session.write(record, args.output)
            say(f"{path}")
            sys.stdout.write("\n".join([*table(record), str(path), ""]) + "\n")
        ok = ok and session.ok
    return 0 if ok else 1


def _end(*_: object) -> None:
    """What ends the command leaves the record of what was measured, as Ctrl-C does."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--gpus", nargs="+", type=int, default=[1, 2], metavar="N", help="1 2 by default; each is timed in turn")
    add("--systems", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM",
        help=f"of {', '.join(SYSTEMS)}; by default all that the model has layers for")  # fmt: skip
    add("--model", nargs="+", default=["qwen3.5-2b"], metavar="MODEL[:LAYERS]",
        help=f"shapes of this model, weights random, at full depth or fewer layers: {', '.join(SHAPES)}")  # fmt: skip
    add("--tokens", type=int, nargs="+", default=[16384], metavar="T", help="of a rank's pack; 16384 by default")
    add("--documents", type=int, nargs="+", default=[131072, 262144], metavar="D",
        help="tokens of the one document of systems that share a pack; 131072 and 262144 by default")  # fmt: skip
    add("--checkpointing", type=checkpointing, metavar="C", help="in place of each system's own")
    add("--rank", type=int, default=16, metavar="R", help="of the adapters; 16 by default")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--backend", default="inductor", choices=["inductor", "aot_eager", "none"], help="how it is compiled")
    add("--warmup", type=int, default=2, metavar="N", help="steps between the first and the timed ones; 2 by default")
    add("--steps", type=int, default=8, metavar="N", help="timed steps; 8 by default")
    add("--seconds", type=float, default=15.0, metavar="S",
        help="of a setting's timed steps together: long steps are fewer, two at least; 15 by default")  # fmt: skip
    add("--check-tokens", type=int, default=1024, metavar="T", help="of a rank in the check; 1024 by default")
    add("--cold-start", action="store_true", help="first steps of the first system with every cache empty")
    add("--seed", type=int, default=0, metavar="N", help="of weights, adapters, lengths and tokens")
    add("--no-checks", action="store_true", help="leave out the check of four layers")
    add("--limit-s", type=float, default=3600.0, metavar="S", help="of the whole invocation; 3600 by default")
    add("--timeout-s", type=float, default=300.0, metavar="S", help="of one setting; 300 by default")
    add("--commit", metavar="HASH", help="of the source, where it lies without its history")
    add("--output", type=Path, default=RECORDS, metavar="DIR", help="where records go; benchmarks/records by default")
    return parser


def _systems_of(model: str) -> list[str]:
    shape = shape_named(model)
    mixture = "num_experts" in shape.values or "num_local_experts" in shape.values
    return [name for name, one in SYSTEMS.items() if (shape.hybrid or not one.states) and (mixture or not one.experts)]


def _specs(args: argparse.Namespace, most: int) -> list[Spec]:
    """One for each model.

    Raises:
        SystemExit: a model, or numbers, that there are not, before anything is measured.
    """
    if min(*args.gpus, args.steps, args.warmup) < 1:
        raise SystemExit("--gpus, --steps and --warmup must be at least 1")
    if args.device == "cuda" and most > torch.cuda.device_count():
        raise SystemExit(f"--gpus {most}: {torch.cuda.device_count()} are here")
    found = []
    for name in args.model:
        model, _, layers = name.partition(":")
        try:
            depth = int(layers) if layers else None
            shape_named(model).config(depth)
        except ValueError as error:
            raise SystemExit(f"--model {name}: {error}") from error
        names = (
            "checkpointing",
            "check_tokens",
            "rank",
            "dtype",
            "device",
            "backend",
            "warmup",
            "steps",
            "seconds",
            "seed",
        )
        found.append(Spec(model, depth, packs=most, **{key: getattr(args, key) for key in names}))
    return found


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal: every result with its share of one GPU's rate, and every check that did not hold."""
    lines = [
        f"{record['subject']} on {record['device']}",
        f"{'':32}{'ms':>10}{'p20':>10}{'p80':>10}{'tok/s/GPU':>11}{'scaling':>9}{'GiB':>8}{'first s':>9}",
    ]
    for config in record["configs"]:
        rates = {
            (r["system"], r["tokens"]): r.get("tokens_per_second_per_gpu") for r in config["results"] if r["gpus"] == 1
        }
        for result in config["results"]:
            name = f"{result['name']} {result.get('label', '')}".strip()
            if result["status"] != "ok":
                lines.append(f"{name:32}{result['status']}: {result['reason']}")
                continue
            first = f"{result['since_start_seconds' if 'label' in result else 'first_step_seconds']:9.1f}"
            if "median_ms" not in result:
                lines.append(f"{name:32}{'':58}{first}")
                continue
            times = "".join(f"{result[key]:10.1f}" for key in ("median_ms", "p20_ms", "p80_ms"))
            rate, one = result["tokens_per_second_per_gpu"], rates.get((result["system"], result["tokens"]))
            scaling = f"{rate / one:9.3f}" if one else f"{'-':>9}"
            peak = f"{result['peak_bytes'] / 2**30:8.1f}" if result["peak_bytes"] else f"{'':8}"
            more = f"  exchange {result['exchange_ms']:.1f} ms" if result.get("exchange_ms") else ""
            lines.append(f"{name:32}{times}{rate:11.0f}{scaling}{peak}{first}{more}")
        red = [check for check in config["checks"] if not check["ok"]]
        lines += [f"RED {c['subject']}: {c['name']}: {c['figure']} > {c['limit']} {c['detail']}" for c in red]
        lines.append(f"{len(config['checks'])} checks, {len(red)} red")
    return lines


if __name__ == "__main__":
    sys.exit(main())
