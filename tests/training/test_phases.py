"""Whatever grows with the model or the data happens inside a phase, and so has a moving line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import make_recipe, save_checkpoint

from deltatune.phases import phase, shown_by
from deltatune.training import run as run_module
from deltatune.training.console import RunConsole
from deltatune.training.equality import difference
from deltatune.training.export import export_adapter, merge_adapter
from deltatune.training.run import train

LARGE = 4096  # elements: a weight of the model has more, and nothing else should
FILES = (".safetensors", ".pt", "train.jsonl")
HEADS = {"_header", "check_first_rows"}  # functions that read the beginning of a file


class Outside(TorchDispatchMode):
    """Notes where operations on large tensors, and reading of large files, happen outside of every phase."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}  # line of ours -> what
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.numel() > LARGE and tensor.device.type != "meta" for tensor in tensors):
            self.note(str(func))
        return result

    def note(self, what: str) -> None:
        if self.counts and not self.open:
            frames = [frame for frame in traceback.extract_stack() if "/deltatune/" in frame.filename]
            if frames and HEADS.isdisjoint(frame.name for frame in frames):
                place = frames[-1]
                self.found.setdefault(f"{Path(place.filename).name}:{place.lineno} {place.line}", what)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.seen.add(name)
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(FILES):
            self.note(f"opens {Path(str(arguments[0])).name}")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    found = Outside()

    class Watched(RunConsole):
        @contextmanager
        def moving_phase(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
            with found.phase(name), super().moving_phase(name, total, done) as advance:
                yield advance

    monkeypatch.setattr(run_module, "RunConsole", Watched)
    sys.addaudithook(found.audit)
    with found, shown_by(Watched(Console(quiet=True)).phase):
        yield found
    found.counts = False  # the hook stays


def test_a_large_tensor_outside_of_a_phase_is_found(outside: Outside) -> None:
    small, large = (torch.ones(1, 2, count) for count in (LARGE // 4, LARGE))
    with phase("comparing"):
        difference(large, large)
    difference(small, small)
    assert outside.found == {}
    difference(large, large)
    assert {place.partition(":")[0] for place in outside.found} == {"equality.py"}


def test_large_tensors_and_files_are_touched_inside_phases_alone(outside: Outside, tmp_path: Path) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    few = {"target_modules": ["q_proj"]}
    outside.counts = False
    base = save_checkpoint(tmp_path / "base")
    more = {"data": {"val_size": 4}, "samples": {"prompts": ["Say it"], "max_new_tokens": 2}, "lora": few}
    first = make_recipe(tmp_path, base, training=training, **more)
    further = make_recipe(tmp_path, base, training={**training, "max_steps": 4}, **more)
    outside.counts = True
    for recipe, resume in ((first, None), (further, True)):
        train(recipe, resume=resume, console=Console(quiet=True))
    merge_adapter(tmp_path / "output", tmp_path / "merged")
    export_adapter(tmp_path / "output", tmp_path / "exported", layout="peft")
    assert outside.found == {}
    expected = {"training", "evaluating", "generating samples", "checking checkpoint-2", "restoring checkpoint-2"}
    assert expected | {"merging", "writing the model", "writing the adapter"} <= outside.seen
