"""Which of Adam's settings an optimizer reads, by transformers' own code, is what recipes are held against."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from deltatune.config.idle import idle_settings
from deltatune.config.schema import Recipe
from deltatune.config.training_section import TrainingSection

PACKAGES = (
    *("apollo_torch", "bitsandbytes.optim", "galore_torch", "grokadamw", "lomo_optim", "optimi", "schedulefree"),
    *("torch_npu.optim", "torch_xla.amp.syncfree", "torchao.optim", "torchdistx.optimizers"),
)
OTHERS = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 0.7, "warmup_steps": 4}


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that optimizers need, and nothing in it."""
    module: Any = import_module("transformers.trainer_optimizer")
    for package in PACKAGES:
        for end in range(1, package.count(".") + 2):
            monkeypatch.setitem(sys.modules, ".".join(package.split(".")[:end]), MagicMock())
    for name in [name for name in vars(module) if name.startswith("is_") and name.endswith("_available")]:
        monkeypatch.setattr(module, name, lambda *_: True)
    monkeypatch.setattr(module, "importlib", SimpleNamespace(metadata=SimpleNamespace(version=lambda _: "1.0")))


def options(folder: Path, optim: str, **settings: float) -> str:
    """What transformers gives an optimizer, as text."""
    targets = {"optim_target_modules": "all-linear"} if optim.startswith(("galore", "apollo")) else {}
    arguments = TrainingArguments(str(folder), optim=optim, use_cpu=True, **targets, **settings)
    _, given = Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Sequential(nn.Linear(2, 2)))
    # low-rank ones have theirs in groups
    groups = [{**group, "params": None} for group in given.pop("params", [])]
    return str((groups, {name: value for name, value in given.items() if name != "model"}))


def refusals(**settings: object) -> list[str]:
    training = TrainingSection.model_validate(settings)
    section = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a"}]}, "training": training}
    return list(idle_settings(Recipe.model_validate(section)))


# layer-wise ones are given the same, each for every parameter
@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames if not name.value.endswith("layerwise")])
def test_what_an_optimizer_does_not_read_is_refused(tmp_path: Path, optim: str) -> None:
    for name, value in OTHERS.items():
        reads = options(tmp_path, optim) != options(tmp_path, optim, **{name: value})
        schedule = {"lr_scheduler_type": "constant"} if name == "warmup_steps" else {}
        found = refusals(**{"optim": optim, name: value, **schedule})
        assert [error.startswith(f"training.{name}: {value} has no effect with ") for error in found] == [True] * (
            not reads
        ), name
