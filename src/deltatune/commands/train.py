"""deltatune train: a recipe from beginning to end."""

from __future__ import annotations

import argparse
import os
import sys

from deltatune.commands.quiet import quiet_libraries
from deltatune.compile.graphs import GraphBreakError
from deltatune.errors import RankFailedError, one_line
from deltatune.training.run import train

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Trains; 1 when the compiler could not capture a layer, with its reason."""
    try:
        # training prints the warnings, with everything else that is saved with the run
        train(args.recipe, resume=args.resume, allow_change=args.allow_change)
    except GraphBreakError as error:
        if args.debug:
            raise
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    except RankFailedError as error:
        # all is said and written down; as Python ends, libraries would wait for ranks that never answer
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.status)
    return 0
