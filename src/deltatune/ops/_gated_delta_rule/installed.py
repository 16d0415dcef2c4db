"""What is installed besides torch, found out without importing it, and how a library's functions are called."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version
from torch import Tensor

from deltatune.ops._gated_delta_rule.documents import Documents

__all__ = ["Call", "Library", "has_nvcc", "version_of"]


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


class Call(NamedTuple):
    """How a function is called.

    Attributes:
        takes: the names of the arguments that change from call to call.
        options: the others.
        returns: the names of its results, empty for those that are not used.
    """

    takes: tuple[str, ...]
    options: Mapping[str, object]
    returns: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A library of CUDA kernels whose functions depend on its version.

    Names of arguments and results are the libraries' own: ``g`` as a result is the decay summed inside chunks
    ``[1, N, G]``, which backward takes for ``g``, and ``A`` the inverse of each chunk's system ``[1, N, G, 64]``.

    Attributes:
        name: as messages call it.
        distribution: whose version counts.
        known: the versions that can be called, in words.
        pip: how one of them is installed.
        load: imports it and returns its functions, by the keys of ``calls``.
        calls: of ``"forward"``, ``"backward"`` and what else is called.
        describe: called with the documents before either, where the library wants to know them.
    """

    name: str
    distribution: str
    known: str
    pip: str
    load: Callable[[], Mapping[str, Callable[..., Any]]]
    calls: Mapping[str, Call]
    describe: Callable[[Documents], None] | None = None

    def run(self, direction: str, documents: Documents, **given: object) -> dict[str, Tensor]:
        """The named results of ``"forward"`` or ``"backward"``, for the arguments that ``Call.takes`` names."""
        if self.describe is not None:
            self.describe(documents)
        call = self.calls[direction]
        given |= vars(documents)
        results = self.load()[direction](**{name: given[name] for name in call.takes}, **call.options)
        if len(results) != len(call.returns):
            raise RuntimeError(
                f"{self.name} {version_of(self.distribution)} returns {len(results)} results from its {direction} "
                f"where {len(call.returns)} are expected: {self.pip}, or use impl='reference'"
            )
        return {name: result for name, result in zip(call.returns, results, strict=True) if name}

    @functools.cached_property
    def problem(self) -> str | None:
        """Why the version that is installed cannot be called, with the remedy; None where it can."""
        found, remedy = f"{self.name} {version_of(self.distribution)}", f"use {self.known}: {self.pip}"
        try:
            functions = self.load()
        except ImportError as error:
            return f"{found} cannot be imported ({error}); {remedy}"
        for key, call in self.calls.items():
            problem = _signature_problem(functions[key], (*call.takes, *call.options))
            if problem is not None:
                return f"{found} is not the one known here: its {problem}; {remedy}"
        return None


def _signature_problem(function: Callable[..., Any], arguments: Sequence[str]) -> str | None:
    """How the function differs from one that takes exactly these keyword arguments; None where it takes them."""
    parameters = inspect.signature(function).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, x in parameters.items() if x.default is x.empty and x.kind not in variadic]
    differences = {
        "lacks": [name for name in arguments if name not in parameters],
        "also wants": [name for name in required if name not in arguments],
    }
    parts = [f"{what} {', '.join(names)}" for what, names in differences.items() if names]
    return f"{function.__name__} {' and '.join(parts)}" if parts else None
