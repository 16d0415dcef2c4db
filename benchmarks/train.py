"""Training steps against stock ones: each system checked, then timed, in a process of its own; a record a model.

    python -m benchmarks.train --model qwen3.5-2b qwen3.5-9b:8 --checkpointing none layer --output out

times qwen3.5-2b at full depth and qwen3.5-9b at 8 layers, each against leak-free stock with layer checkpointing.
``--frontier`` sweeps the memory settings; ``--targets qkvo all`` adds adapters on all linears; ``--baselines`` names
what it is timed against; ``--profile`` adds the kernels of a step; ``--cold-start`` adds first steps, with an empty
and a filled compiler cache. What cannot run (a package is missing, memory is short, time is up) says so in the record
and the rest goes on. ``--limit-s`` bounds the whole invocation. Every system is held to float32 and to the stock path
first; ``--no-checks`` leaves that out, for a second look at a tree that has been checked.

On a GPU machine: ``PYTHONPATH=$SITE:src:. python -m benchmarks.train ... --output $OUT``. The ``deltatune`` that is
found first is the one that is timed. ``python -m benchmarks.compare`` times two trees in turns. Exit status 1 where a
check is red or a system was not timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RECORDS
from benchmarks.session import Job, Session, ours
from benchmarks.shapes import BASES, SHAPES, TARGETS, shape_named
from benchmarks.systems import BASELINES, Setting, draw_lengths
from benchmarks.worker import Spec

__all__ = ["add_workload", "checkpointing", "main", "specs"]

FRONTIER = ("none", 0.8, 0.6, 0.4, 0.2, "layer", "auto")
"""What ``--frontier`` sweeps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every model, writes a record for each and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=(__doc__ or "").splitlines()[0])
    add_workload(parser)
    add = parser.add_argument
    add("--baselines", nargs="*", default=["stock", "stock as shipped"], choices=BASELINES, metavar="SYSTEM",
        help=f"of {', '.join(BASELINES)}; stock and 'stock as shipped' by default, no word after it: none")  # fmt: skip
    add("--baseline-checkpointing", nargs="+", default=["layer"], choices=["none", "layer"])
    add("--frontier", action="store_true", help=f"ours with checkpointing {' '.join(map(str, FRONTIER))}")
    add("--lora", default="auto", choices=["auto", "stock", "fused"], help="as prepare takes it; auto by default")
    add(
        "--base",
        nargs="+",
        default=["16-bit"],
        choices=["16-bit", *BASES],
        help="the weights of our layers: as they are, or in few bits; in the last, products are in fp8 too",
    )
    add("--rounds", type=int, default=1, metavar="N", help="turns of every system; 1 by default")
    add("--cold-start", action="store_true", help="ours at its first setting, with the compiler's cache empty and full")
    args = parser.parse_args(argv)
    ends, ok = time.monotonic() + args.limit_s, True
    for spec in specs(args):
        session = Session(spec, checks=not args.no_checks, limit_seconds=ends - time.monotonic(), folder=args.output)
        interrupted = True
        try:
            with tempfile.TemporaryDirectory() as cache:
                session.run(_jobs(args, cache))
            interrupted = False
        finally:  # what has been measured is kept, whatever comes after it
            kind = "frontier" if args.frontier else "train"
            record = session.record(kind, commit=args.commit, interrupted=interrupted)
            path = session.write(record, args.output)
            sys.stdout.write("\n".join([*table(record), str(path), ""]) + "\n")
        ok = ok and session.ok
    return 0 if ok else 1


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Options that ``benchmarks.compare`` has too."""
    add = parser.add_argument
    add("--model", nargs="+", default=["qwen3.5-2b"], metavar="MODEL[:LAYERS]",
        help=f"shapes of this model, weights random, at full depth or fewer layers: {', '.join(SHAPES)}")  # fmt: skip
    add("--tokens", type=int, nargs="+", default=[16384], metavar="T", help="of a pack; 16384 by default")
    add("--one-document", action="store_true", help="as long as the pack, in place of 64 to 2048 tokens each")
    add("--checkpointing", nargs="+", default=["none", "layer"], type=checkpointing, metavar="C",
        help="of ours: none, layer, auto or the share of activations that stays; none layer by default")  # fmt: skip
    what = "what has adapters: q, k, v and o, all linear layers, or q, k, v, o and all routed experts; qkvo"
    add("--targets", nargs="+", default=["qkvo"], choices=list(TARGETS), help=what)
    add("--rank", type=int, default=16, metavar="R", help="of the adapters; 16 by default")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="inductor", choices=["inductor", "aot_eager", "none"], help="how ours is compiled")
    add("--warmup", type=int, default=3, metavar="N", help="steps before timing; 3 by default")
    add("--steps", type=int, default=12, metavar="N", help="timed steps of a system in each round; 12 by default")
    add("--profile", action="store_true", help="add the kernels of a step of ours")
    add("--seed", type=int, default=0, metavar="N", help="of weights, adapters, lengths and tokens")
    add("--no-checks", action="store_true", help="time alone")
    add("--limit-s", type=float, default=3600.0, metavar="S", help="of the whole invocation; 3600 by default")
    add("--commit", metavar="HASH", help="of the source, where it lies without its history")
    add("--output", type=Path, default=RECORDS, metavar="DIR", help="where records go; benchmarks/records by default")


def checkpointing(text: str) -> str | float:
    """A setting as ``prepare`` takes it."""
    if text in ("none", "layer", "auto"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected none, layer, auto or a share from 0 to 1, got {text!r}")
    return share


def specs(args: argparse.Namespace) -> list[Spec]:
    """One for each model and number of tokens.

    Raises:
        SystemExit: a model or a size that there is not, before anything is measured.
    """
    if min(args.steps, args.warmup, args.rounds) < 1:
        raise SystemExit("--steps, --warmup and --rounds must be at least 1")
    return [spec for name in args.model for spec in _specs_of(name, args)]


def _specs_of(name: str, args: argparse.Namespace) -> list[Spec]:
    model, _, layers = name.partition(":")
    try:
        depth = int(layers) if layers else None
        shape_named(model).config(depth)
        bounds = [{"shortest": t, "longest": t} if args.one_document else {} for t in args.tokens]
        lengths = [draw_lengths(t, seed=args.seed, **more) for t, more in zip(args.tokens, bounds, strict=True)]
    except ValueError as error:
        raise SystemExit(f"--model {name}: {error}") from error
    names = ("rank", "dtype", "device", "backend", "warmup", "steps", "seed", "profile")
    same = {key: getattr(args, key) for key in names}
    return [Spec(model, depth, tuple(drawn), (), **same) for drawn in lengths]


def _jobs(args: argparse.Namespace, cache: str) -> list[Job]:
    bases = ["" if base == "16-bit" else base for base in args.base]
    jobs = [
        Job(
            tuple(Setting(system, how, args.targets[0]) for how in args.baseline_checkpointing),
            rounds=args.rounds,
            # the leak-free path is what others are held to, and as shipped it is known to leak
            checked=system == "stock liger",
        )
        for system in args.baselines
    ]
    if args.frontier:
        jobs.append(Job(ours(FRONTIER, args.targets[:1], args.lora, bases), rounds=args.rounds))
        rest = ours(args.checkpointing, args.targets[1:], args.lora, bases)
    else:
        rest = ours(args.checkpointing, args.targets, args.lora, bases)
    jobs += [Job(rest, rounds=args.rounds)] if rest else []
    if args.cold_start:
        first = ours(args.checkpointing[:1], args.targets[:1], args.lora, bases[:1])
        where = {"TORCHINDUCTOR_CACHE_DIR": cache}
        jobs += [Job(first, label=f"caches {state}", environment=where) for state in ("cold", "warm")]
    return jobs


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal: every result, and every check that did not hold."""
    lines = [
        f"{record['subject']} on {record['device']}",
        f"{'':48}{'ms':>9}{'p20':>9}{'p80':>9}{'tok/s':>9}{'GiB':>8}",
    ]
    for config in record["configs"]:
        for result in config["results"]:
            name = f"{result['name']} {result.get('label', '')}".strip()
            if result["status"] != "ok" or "median_ms" not in result:
                lines.append(f"{name:48}{result['status']}: {result['reason']}")
                continue
            times = "".join(f"{result[key]:9.1f}" for key in ("median_ms", "p20_ms", "p80_ms"))
            peak = f"{result['peak_bytes'] / 2**30:8.1f}" if result["peak_bytes"] else ""
            lines.append(f"{name:48}{times}{result['tokens_per_second']:9.0f}{peak}")
        red = [check for check in config["checks"] if not check["ok"]]
        lines += [f"RED {c['subject']}: {c['name']}: {c['figure']} > {c['limit']} {c['detail']}" for c in red]
        lines.append(f"{len(config['checks'])} checks, {len(red)} red")
    return lines


if __name__ == "__main__":
    sys.exit(main())
