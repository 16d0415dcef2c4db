"""Where a figure comes from: the device, the versions of everything that ran, and the state of the source."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

import deltatune

__all__ = ["device_name", "source_digest", "source_state", "versions"]

_PACKAGE: Final = Path(deltatune.__file__).parent
_DISTRIBUTIONS: Final = (
    "transformers",
    "peft",
    "fla-core",
    "flash-qla",
    "tilelang",
    "liger-kernel",
    "cut-cross-entropy",
)


def versions() -> dict[str, str]:
    """Name -> version of what is installed, without importing it."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in ("triton", *_DISTRIBUTIONS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The GPU's own name, or ``cpu:`` and the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu: {platform.machine()}"


def source_digest() -> str:
    """SHA-256 over the names and contents of the package's Python files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def source_state() -> tuple[str | None, bool | None]:
    """``(commit, whether the package's files differ from it)``, each None without git or without a history."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, None
    status = _git("status", "--porcelain", "--", str(_PACKAGE))
    return commit, None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
