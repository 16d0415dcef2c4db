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

    def first(self, *words: str) -> int:
        """The number of the first write that says all of these words."""
        return next(int(line.split()[0]) for line in self.writes if all(word in line for word in words))


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The recipe of a kind of ``KINDS``, with settings laid over it, in a folder of its own with all that it names."""

    @cache
    def made(kind: str, *words: str) -> Path:
        return make_case(tmp_path_factory.mktemp(kind), kind, words)

    return made


@pytest.fixture(scope="session")
def cases(recipes: Callable[..., Path]) -> Callable[..., Case]:
    """The case of such a recipe."""

    @cache
    def made(kind: str, *words: str) -> Case:
        recipe = recipes(kind, *words)
        whole = recipe.parent / "whole" / "output"
        assert run(recipe, whole) == 0
        return Case(recipe, whole, writes(whole))

    return made


@pytest.fixture(scope="session")
def case(cases: Callable[..., Case]) -> Case:
    """The case of adapters."""
    return cases("lora")


@pytest.fixture(scope="session")
def seconds(case: Case) -> float:
    """What its run takes, now that the tokenised data and the processes' parent are there."""
    began = time.monotonic()
    assert run(case.recipe, case.recipe.parent / "timed" / "output") == 0
    return time.monotonic() - began
