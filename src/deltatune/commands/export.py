"""deltatune export: an adapter in the form that an inference server reads."""

from __future__ import annotations

import argparse
import sys

from deltatune.commands.quiet import quiet_libraries
from deltatune.training.export import export_adapter

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Writes ``args.adapter`` to ``args.output`` in the layout that was asked for."""
    folder = export_adapter(
        args.adapter, args.output, layout=args.layout, base=args.base, trust_remote_code=args.trust_remote_code
    )
    sys.stdout.write(f"adapter in {folder}\n")
    return 0
