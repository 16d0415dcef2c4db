"""What is read from transformers' source is what transformers has when it is imported."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from deltatune.hf import source
from deltatune.hf.source import annotated_fields, enum_values, mapping_keys, modeling_text, schedule_arguments

_STEPS = {"optimizer", "num_warmup_steps", "num_training_steps"}


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("training_args.py", OptimizerNames),
        ("trainer_utils.py", SchedulerType),
        ("trainer_utils.py", HubStrategy),
        ("trainer_utils.py", IntervalStrategy),
    ],
)
def test_enums(file: str, kind: type) -> None:
    assert enum_values(file, kind.__name__) == tuple(member.value for member in kind)


def test_fields_and_trackers() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(annotated_fields("training_args.py", "TrainingArguments")) == fields
    assert mapping_keys("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK") == tuple(
        INTEGRATION_TO_CALLBACK
    )


@pytest.mark.parametrize("kind", SchedulerType)
def test_arguments_of_schedules(kind: SchedulerType) -> None:
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    found = schedule_arguments(kind.value)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert found is None
        return
    assert found is not None
    taken, required = found
    assert set(taken) == set(parameters) - _STEPS
    assert (
        set(required)
        == {name for name, parameter in parameters.items() if parameter.default is parameter.empty} - _STEPS
    )


def test_what_is_not_found_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert enum_values("training_args.py", "NoSuchNames") is None
    assert enum_values("no_such_file.py", "OptimizerNames") is None
    assert annotated_fields("training_args.py", "NoSuchArguments") is None
    assert mapping_keys("training_args.py", "NO_SUCH_MAPPING") is None
    assert schedule_arguments("no_such_schedule") is None
    assert modeling_text("no_such_family") is None
    assert modeling_text("../models") is None
    monkeypatch.setattr(source, "find_spec", lambda _: None)
    source._root.cache_clear()
    assert source.conversion_text() is None
    monkeypatch.undo()
    source._root.cache_clear()


def test_a_familys_source_names_its_layers() -> None:
    assert "self.q_proj" in (modeling_text("qwen3") or "")
