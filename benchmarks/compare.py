"""Two trees of deltatune in turns: before, after, before, after; one record with both and the ratio.

    python -m benchmarks.compare --before /path/to/old/src --after src --model qwen3.5-2b --targets qkvo \\
        --checkpointing none layer --rounds 2 --output out

Every turn is a process of its own that has one of the folders first on its path and times all settings; the first
turn of each is held to float32 and to the stock path before. A ratio is the median of all samples after over that
before; ``by_round`` has it for each pair of turns, and with ``--profile`` ``ratio_of_kernels`` that of the time inside
kernels in one step, which a slow host does not change. Options are those of ``benchmarks.train``. Exit status 1 where a
check is red, a setting was not timed, or a ratio is above ``--at-most``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import source_of
from benchmarks.session import Job, Session, ours
from benchmarks.train import add_workload, specs, table

__all__ = ["main", "ratios"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every model, writes a record for each and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    add_workload(parser)
    add = parser.add_argument
    add("--before", type=_tree, required=True, metavar="DIR", help="the folder that holds the one deltatune")
    add("--after", type=_tree, default="src", metavar="DIR", help="the folder that holds the other; src by default")
    add("--before-commit", metavar="HASH", help="of that folder; read from git where it is tracked")
    add("--rounds", type=int, default=2, metavar="N", help="turns of each; 2 by default")
    add("--lora", default="auto", choices=["auto", "stock", "fused"], help="as prepare takes it; auto by default")
    add("--at-most", type=float, metavar="RATIO", help="exit with 1 above this ratio, such as 1.02")
    args = parser.parse_args(argv)
    sides = {"before": args.before, "after": args.after}
    commits = {"before": args.before_commit, "after": args.commit}
    sources = {label: source_of(path / "deltatune", commits[label]) for label, path in sides.items()}
    ends, ok = time.monotonic() + args.limit_s, True
    for spec in specs(args):
        session = Session(spec, checks=not args.no_checks, limit_seconds=ends - time.monotonic(), folder=args.output)
        settings = ours(args.checkpointing, args.targets, args.lora)
        interrupted = True
        try:
            session.run([Job(settings, label, path, args.rounds) for label, path in sides.items()])
            interrupted = False
        finally:
            found = list(ratios(session.results))
            more = {"sources": sources, "ratios": found}
            record = session.record("compare", commit=args.commit, interrupted=interrupted, **more)
            path = session.write(record, args.output)
            lines = [f"{r['name']:48}after / before {r['ratio']:.4f}  by round {_each(r)}" for r in found]
            sys.stdout.write("\n".join([*table(record), *lines, str(path), ""]) + "\n")
        slower = args.at_most is not None and any(r["ratio"] > args.at_most for r in found)
        ok = ok and session.ok and not slower
    return 0 if ok else 1


def ratios(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """After over before, of every setting that both were timed at."""
    timed = {(r["label"], r["name"]): r for r in results if r["status"] == "ok" and "median_ms" in r}
    for label, name in timed:
        before, after = timed.get(("before", name)), timed.get(("after", name))
        if label != "before" or before is None or after is None:
            continue
        pairs = zip(before["round_medians_ms"], after["round_medians_ms"], strict=False)
        kernels = [sum(row["ms"] for row in side.get("kernels_of_a_step", ())) for side in (before, after)]
        yield {
            "name": name,
            "ratio": after["median_ms"] / before["median_ms"],
            "ratio_of_kernels": kernels[1] / kernels[0] if all(kernels) else None,
            "by_round": [late / early for early, late in pairs],
            "peak_bytes_more": (after["peak_bytes"] or 0) - (before["peak_bytes"] or 0),
        }


def _each(ratio: Mapping[str, Any]) -> str:
    return " ".join(f"{one:.4f}" for one in ratio["by_round"])


def _tree(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "deltatune" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder that holds deltatune/, got {text}")
    return path


if __name__ == "__main__":
    sys.exit(main())
