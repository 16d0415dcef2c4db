"""deltatune train: a recipe from beginning to end."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from deltatune.commands.quiet import quiet_libraries
from deltatune.compile.graphs import GraphBreakError
from deltatune.errors import RankFailedError, one_line
from deltatune.signals import Interruption
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
        _leave(error.status)
    except Interruption as error:
        if "RANK" not in os.environ:
            raise
        if os.environ["RANK"] == "0":
            sys.stderr.write(f"{error}\n")
        _leave(error.status)
    return 0


def _leave(status: int) -> NoReturn:
    """Ends one of several ranks where all is said and written down.

    As Python ends, libraries would wait for ranks that never answer.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
