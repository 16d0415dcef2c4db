"""Names of the implementations of ops, read from the source that declares them: importing it takes torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

from deltatune.config.schema import Recipe

__all__ = ["kernel_errors", "kernel_names"]


def kernel_names() -> dict[str, tuple[str, ...]]:
    """The implementations of each op, in the order of its ``providers``, which a test holds them against."""
    found = {}
    for folder in (files("deltatune") / "ops").iterdir():
        file = folder / "providers.py"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            (op,) = re.findall(r'^    op(?:: ClassVar\[str\])? = "(\w+)"$', text, re.MULTILINE)
            found[op] = tuple(re.findall(r'^        Provider\("(\w+)", ', text, re.MULTILINE))
    return found


def kernel_errors(recipe: Recipe) -> Iterator[str]:
    """Implementations that no op has, one line each."""
    if recipe.kernels == "auto":
        return
    known = kernel_names()
    for op, name in recipe.kernels.items():
        if name != "auto" and name not in known[op]:
            choices = ", ".join(map(repr, known[op]))
            yield f"kernels.{op}: unknown impl={name!r}; expected 'auto' or one of {choices}"
