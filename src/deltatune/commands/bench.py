"""deltatune bench: one of the benchmarks, or what is made of their records."""

from __future__ import annotations

import argparse
import importlib

from deltatune.commands.quiet import quiet_libraries

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Hands over to the module of the benchmark that was named; its exit status."""
    status: int = importlib.import_module(f"deltatune.bench.{args.benchmark}").run(args)
    return status
