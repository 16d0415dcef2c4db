"""The command that a run was started with, as it can be typed again."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Final

__all__ = ["STARTED_BY", "command_line", "resuming_command", "starting_again"]

#: The environment variable in which a launcher tells the processes that it starts its own command.
STARTED_BY: Final = "DELTATUNE_COMMAND"


def command_line() -> str:
    """What was typed; of a process that ``train --nproc`` started, what its launcher was called with."""
    told = os.environ.get(STARTED_BY)
    if told:
        return told
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return shlex.join(["python", "-m", script.parent.name, *sys.argv[1:]])
    return shlex.join([script.name if script.name == "deltatune" else sys.argv[0], *sys.argv[1:]])


def starting_again() -> str:
    """That the command is started again, as a clause; of a launcher that does not tell its own, none is named."""
    return "start it again" if _launched_by_another() else f"start it again with {command_line()}"


def resuming_command(checkpoint: Path | None = None) -> str:
    """What is typed to go on with the run that this command works on; its option alone where that is not known.

    A launcher that does not tell its own command, such as torchrun, starts one for each rank.

    Args:
        checkpoint: what to go on from, if not the last one in ``training.output_dir``.
    """
    option = ["--resume"] if checkpoint is None else ["--resume", str(checkpoint)]
    if _launched_by_another():
        return shlex.join(option)
    words = shlex.split(command_line())
    if "train" not in words or not (words[0] == "deltatune" or words[:3] == ["python", "-m", "deltatune"]):
        return shlex.join(option)
    kept, before = [], ""
    for word in words:
        is_place = before == "--resume" and not word.startswith("-")
        if not is_place and word.partition("=")[0] != "--resume":
            kept.append(word)
        before = word
    return shlex.join([*kept, *option])


def _launched_by_another() -> bool:
    return "RANK" in os.environ and not os.environ.get(STARTED_BY)
