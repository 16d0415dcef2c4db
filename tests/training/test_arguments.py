"""The recipe's training section as TrainingArguments."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import TOKENS, Packs, make_trainer
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from deltatune import prepare
from deltatune.config.refused import PASSED_TRAINING_NAMES
from deltatune.config.training_section import TrainingSection
from deltatune.errors import RecipeKeyError, UserError
from deltatune.training import trainer as trainer_module
from deltatune.training.arguments import training_arguments
from deltatune.training.names import check_names
from deltatune.training.sealed_trainer import SealedTrainer
from tiny import tiny_model


def test_names_are_transformers_own_and_defaults_suit_packs(tmp_path: Path) -> None:
    section = TrainingSection(output_dir=str(tmp_path / "out"), adam_beta2=0.95, use_cpu=True, save_on_each_node=True)
    arguments = training_arguments(section)
    assert arguments.adam_beta2 == 0.95
    assert arguments.save_on_each_node
    assert arguments.ddp_broadcast_buffers is None  # the trainer sees to it: an argument of DDP of this name warns
    assert arguments.report_to == []
    assert not arguments.logging_nan_inf_filter
    assert not arguments.remove_unused_columns
    assert arguments.average_tokens_across_devices
    assert arguments.per_device_train_batch_size == arguments.per_device_eval_batch_size == 1
    assert arguments.prediction_loss_only
    assert not (tmp_path / "out").exists(), "arguments alone write nothing"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnin_rate": 1e-4}, r"training\.learnin_rate.*learning_rate"),
        ({"lr_scheduler_type": "linaer"}, r"training\.lr_scheduler_type: linaer is unknown \(did you mean linear\?\)"),
        ({"optim": "adamw_of_no_kind"}, r"training\.optim: adamw_of_no_kind is unknown"),
        ({"fp16": True}, r"training\.fp16 needs a GPU, and this run would train on the CPU"),
        ({"tf32": True}, r"training\.tf32 needs a GPU, and this run would train on the CPU"),
    ],
)
def test_bad_values_are_user_errors(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_arguments(TrainingSection(output_dir=str(tmp_path), use_cpu=True, **values))


@pytest.mark.parametrize(
    ("schedule", "given", "message"),
    [
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "lr_scheduler_type: warmup_stable_d"),
    ],
)
def test_schedules_are_gone_through(tmp_path: Path, schedule: str, given: dict[str, Any], message: str) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 1e-3, "lr_scheduler_type": schedule}
    with pytest.raises(UserError, match=message):
        training_arguments(TrainingSection(**settings, lr_scheduler_kwargs=given))


# those that need arguments or evaluations
LEFT = ("warmup_stable_decay", "greedy", "reduce_lr_on_plateau")


@pytest.mark.parametrize("schedule", [name for name in SchedulerType if name not in LEFT])
def test_schedules_of_every_kind_pass(tmp_path: Path, schedule: SchedulerType) -> None:
    given = {"min_lr": 1e-5} if "min_lr" in schedule else None
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "lr_scheduler_type": schedule.value}
    training_arguments(TrainingSection(**settings, lr_scheduler_kwargs=given))


@pytest.mark.parametrize(
    ("schedule", "given", "message"),
    [
        ("polynomial", {"power": "high"}, 'power: expected a number, got "high"'),
        ("polynomial", {"lr_end": 1e-2}, "lr_end: 0.01 must be below training.learning_rate: 0.001"),
        ("cosine_with_min_lr", {"min_lr": "high"}, 'min_lr: expected a number or null, got "high"'),
        ("cosine_with_min_lr", {}, "cosine_with_min_lr needs one of min_lr, min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "needs one of min_lr, min_lr_rate"),
        ("cosine_with_restarts", {"num_cycles": "two"}, 'num_cycles: expected a whole number, got "two"'),
    ],
)
def test_arguments_of_schedules_are_of_their_types(schedule: str, given: dict[str, Any], message: str) -> None:
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": given}
    with pytest.raises(RecipeKeyError, match=message):
        check_names(TrainingSection.model_validate(settings))


def test_a_backend_is_for_several_processes(tmp_path: Path) -> None:
    section = TrainingSection(output_dir=str(tmp_path), use_cpu=True, ddp_backend="gloo")
    assert training_arguments(section).world_size == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataloader_drop_last": "maybe"}, 'dataloader_drop_last: expected true or false, got "maybe"'),
        ({"ddp_timeout": "long"}, "ddp_timeout: expected a whole number, got"),
        ({"ddp_timeout": True}, "ddp_timeout: expected a whole number, got true"),
        ({"eval_delay": "3"}, "eval_delay: expected a number, got"),
        ({"ddp_static_graph": 1}, "ddp_static_graph: expected true or false or null, got 1"),
        ({"log_level": "loud"}, "log_level: loud is unknown; known: passive"),
        ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen: some is unknown"),
        ({"ddp_backend": "gluu"}, "ddp_backend: gluu is unknown"),
        ({"optim_args": "momentum"}, 'optim_args: expected name=value,name=value, got "momentum"'),
        ({"optim_args": "a=1,"}, "optim_args: expected name=value"),
        ({"accelerator_config": {"split": True}}, "accelerator_config: split is unknown"),
    ],
)
def test_values_are_of_their_types(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeKeyError, match=re.escape(f"training.{message}")):
        check_names(TrainingSection(output_dir=str(tmp_path), **values))


@pytest.mark.parametrize(
    "values",
    [
        {"dataloader_drop_last": True, "eval_delay": 3, "ddp_timeout": 90, "tf32": None, "hub_private_repo": False},
        {"log_level": "info", "include_num_input_tokens_seen": True, "accelerator_config": {}, "eval_on_start": False},
        {"include_num_input_tokens_seen": "all", "trackio_static_space_id": False, "logging_strategy": "epoch"},
        {"optim_target_modules": ["q_proj"], "optim_args": "a=1", "hub_strategy": "end", "ddp_backend": "gloo"},
    ],
)
def test_values_of_their_types_pass(tmp_path: Path, values: dict[str, Any]) -> None:
    check_names(TrainingSection(output_dir=str(tmp_path), **values))


PASSED = {
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    "dataloader_drop_last": True,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "ddp_broadcast_buffers": True,
    "ddp_bucket_cap_mb": 7,
    "ddp_find_unused_parameters": True,
    "ddp_static_graph": True,
    "ddp_timeout": 77,
    "eval_delay": 2,
    "eval_on_start": True,
    "full_determinism": True,
    "greater_is_better": True,
    "hub_always_push": True,
    "hub_model_id": "me/mine",
    "hub_private_repo": True,
    "hub_revision": "other",
    "hub_strategy": "checkpoint",
    "include_num_input_tokens_seen": "all",
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "logging_strategy": "epoch",
    "metric_for_best_model": "eval_loss",
    "optim_args": "momentum=0.5",
    "optim_target_modules": "all-linear",
    "project": "mine",
    "push_to_hub": False,
    "save_on_each_node": True,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 3,
    "trackio_bucket_id": "me/bucket",
    "trackio_space_id": "me/space",
    "trackio_static_space_id": "me/static",
    "train_sampling_strategy": "sequential",
}
# need packages, GPUs or several processes
NOT_TRIED = {"ddp_backend", "tf32"}


def test_every_name_that_is_passed_on_is_tried() -> None:
    assert set(PASSED) | NOT_TRIED == PASSED_TRAINING_NAMES


def test_what_is_passed_on_arrives(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    given = {name: value for name, value in PASSED.items() if name in names}
    values = {"output_dir": str(tmp_path), "use_cpu": True, "eval_strategy": "steps", "dataloader_num_workers": 1}
    arguments = training_arguments(TrainingSection.model_validate({**values, **given}))
    for name, value in given.items():
        found = getattr(arguments, name)
        if name == "accelerator_config":
            assert found.gradient_accumulation_kwargs == PASSED[name]["gradient_accumulation_kwargs"]
        else:
            assert getattr(found, "value", found) == value, name


def test_what_is_passed_on_acts(tmp_path: Path) -> None:
    training: dict[str, Any] = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_delay": 3,
        "eval_on_start": True,
        "include_num_input_tokens_seen": "all",
        "logging_strategy": "epoch",
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "torch_empty_cache_steps": 1,
        "skip_memory_metrics": False,
    }
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    packs = Packs(2)
    trainer = make_trainer(tmp_path, model=model, packs=packs, eval_packs=Packs(1), **training)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 3, 4]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4]
    assert trainer.state.num_input_tokens_seen == 4 * TOKENS
    assert packs.seen == [0, 1, 0, 1]
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5
    assert "train_mem_cpu_alloc_delta" in history[-1]


@pytest.mark.parametrize("asked", [None, False, True])
def test_replicas_send_buffers_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asked: bool | None
) -> None:
    class Replicated(nn.Module):
        broadcast_buffers = True

    monkeypatch.setattr(trainer_module, "DistributedDataParallel", Replicated)
    monkeypatch.setattr(SealedTrainer, "training_step", lambda *_: torch.zeros(()))
    trainer = make_trainer(tmp_path, ddp_broadcast_buffers=asked)
    trainer._finite.begin(1, [])
    replicated = Replicated()
    trainer.training_step(replicated, {})
    assert replicated.broadcast_buffers is (asked is True)
