"""What is installed besides torch, found out without importing it: versions, a CUDA compiler, function signatures."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

__all__ = ["has_nvcc", "signature_problem", "version_of"]


@functools.cache
def version_of(*distributions: str) -> Version | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def has_nvcc() -> bool:
    """Whether a CUDA compiler is where TileLang looks for one: its kernels are compiled at their first call."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc") is not None or any((Path(home) / "bin" / "nvcc").exists() for home in homes if home):
        return True
    try:
        return any(file.name == "nvcc" for file in metadata.files("nvidia-cuda-nvcc") or ())
    except metadata.PackageNotFoundError:
        return False


def signature_problem(function: Callable[..., Any], arguments: Sequence[str]) -> str | None:
    """How the function differs from one that takes exactly these keyword arguments; None where it takes them."""
    parameters = inspect.signature(function).parameters
    missing = [name for name in arguments if name not in parameters]
    unknown = [
        name
        for name, parameter in parameters.items()
        if name not in arguments
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if not missing and not unknown:
        return None
    parts = ["lacks " + ", ".join(missing)] * bool(missing) + ["also wants " + ", ".join(unknown)] * bool(unknown)
    return f"{function.__name__} " + " and ".join(parts)
