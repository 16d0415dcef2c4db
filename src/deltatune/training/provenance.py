"""Which command, machine and versions made something, as records keep it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import deltatune
from deltatune.ops._nvidia import version_of
from deltatune.runs.command import command_line

__all__ = ["now", "process_identity", "versions"]


def process_identity() -> dict[str, Any]:
    """The ``command``, the ``folder`` it runs in, ``host``, ``git`` (the commit of that folder) and ``deltatune``.

    The last is its version, and its commit where it runs from a checkout.
    """
    return {
        "command": command_line(),
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "git": _commit(Path.cwd()),
        "deltatune": {"version": deltatune.__version__, "git": _own_commit()},
    }


def versions() -> dict[str, str]:
    """Of Python, deltatune and the packages that compute."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "flash-linear-attention")
    found = {name: str(version) for name in names if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), "deltatune": deltatune.__version__, **found}


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _own_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one, wherever that lies."""
    own = Path(deltatune.__file__)
    return _commit(own.parent) if _git(own.parent, "ls-files", "--error-unmatch", own.name) else None


def _commit(folder: Path) -> str | None:
    """The commit of a folder, with a mark if it was changed."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
