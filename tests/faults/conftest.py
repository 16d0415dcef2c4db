"""A case for each kind of run, and what its run leaves where nothing happens to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for the cases of its tests

from fault_cases import make_case, run, writes


@dataclass(frozen=True)
class Case:
    """A recipe, and what its run leaves where nothing happens to it."""

    recipe: Path
    whole: Path  # the folder of that run
    writes: list[str]  # "number what file" each
    seconds: float

    def first(self, *words: str) -> int:
        """The number of the first write that says all of these words."""
        return next(int(line.split()[0]) for line in self.writes if all(word in line for word in words))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a kind of ``KINDS``."""

    @cache
    def made(kind: str) -> Case:
        folder = tmp_path_factory.mktemp(kind)
        recipe = make_case(folder, kind)
        for name in (
            "cached",
            "whole",
        ):  # the first fills the cache of tokenised data, and starts the processes' parent
            began = time.monotonic()
            assert run(recipe, folder / name / "output") == 0
        whole = folder / "whole" / "output"
        return Case(recipe, whole, writes(whole), time.monotonic() - began)

    return made


@pytest.fixture(scope="session")
def case(cases: Callable[[str], Case]) -> Case:
    """The case of adapters."""
    return cases("lora")
