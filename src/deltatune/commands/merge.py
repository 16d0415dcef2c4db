"""deltatune merge: an adapter and its base model as one plain checkpoint."""

from __future__ import annotations

import argparse
import sys

from deltatune.commands.quiet import quiet_libraries
from deltatune.training.export import merge_adapter

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Merges ``args.adapter`` into its base and writes ``args.output``."""
    folder = merge_adapter(
        args.adapter,
        args.output,
        base=args.base,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        allow_other_base=args.allow_other_base,
        say=lambda line: sys.stdout.write(f"{line}\n"),
    )
    sys.stdout.write(f"merged model in {folder}\n")
    return 0
