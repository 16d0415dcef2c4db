"""Triton's interpreter at the least cost, where TRITON_INTERPRET=1 asks for it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest


class PatchedOnce:
    """What ``triton.language`` holds while a kernel is interpreted, exchanged and put back once for each launch.

    Triton looks for all there is to exchange at every call of a device function too: a third of the time.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.scopes: dict[int, Any] = {}  # by the globals that functions see triton.language in

    def __call__(self, function: Any) -> "PatchedOnce":
        seen = id(function.__globals__)
        if seen not in self.scopes:
            self.scopes[seen] = self.patch(function)
        return self

    def restore(self) -> None:
        while self.scopes:
            self.scopes.popitem()[1].restore()


@pytest.fixture(scope="session", autouse=True)
def the_interpreter_does_nothing_in_vain() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs triton")
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", PatchedOnce(interpreter._patch_lang))
        # whether a sum of indices overflows is computed for an assertion that only ``debug`` makes
        assert not builder.options.debug
        patches.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
