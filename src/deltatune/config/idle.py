"""Settings of the training loop that act only beside another one, or do nothing beside it.

A setting counts where it differs from its default. A switch that is off by its own key (``report_to: none``,
``eval_strategy: no``), as a short trial run sets it, leaves what it would have read without effect on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from deltatune.config.defaults import differs
from deltatune.config.rewards import REWARDS
from deltatune.config.schema import Recipe
from deltatune.config.training_section import TrainingSection

__all__ = ["BESIDE", "BY_PLATEAU", "has_no_effect", "idle_settings", "is_off_on_purpose"]

BY_PLATEAU: Final = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow evaluations rather than steps."""

# what a finding says of a setting that does nothing here
_NO_EFFECT: Final = "has no effect with"
_NO_ACT: Final = "cannot act without"

# parts of the names of optimizers that read optim_args, and optim_target_modules
_READ_ARGUMENTS: Final = (
    *("ademamix", "adagrad", "anyprecision", "apollo", "galore", "grokadamw", "rmsprop", "schedule_free", "sgd"),
    *("stable_adamw", "torch_4bit", "torch_8bit"),
)
_READ_TARGETS: Final = ("apollo", "galore")
# and of those that transformers gives no betas, no epsilon, and the steps of warm-up whatever the schedule is
_WITHOUT_BETAS: Final = ("adafactor", "adagrad", "galore", "grokadamw", "lomo", "rmsprop", "sgd")
_WITHOUT_EPSILON: Final = (*_WITHOUT_BETAS, "lion")
_WARM_UP: Final = ("schedule_free_adamw", "schedule_free_sgd")
_NAMED_RUNS: Final = ("wandb", "trackio", "mlflow", "comet_ml", "swanlab")


@dataclass(frozen=True)
class _Need:
    names: str  # of settings
    met: Callable[[Recipe, dict[str, Any]], bool]  # by the recipe, and by the settings that are given
    remedy: str
    switch: str | None = None  # the setting that makes them act, and is off on purpose where it is given


@dataclass(frozen=True)
class _Clash:
    names: str  # of settings
    other: str  # the setting that leaves them nothing to do
    idle: Callable[[TrainingSection], bool]  # where it does


def _evaluates(recipe: Recipe, _: dict[str, Any]) -> bool:
    return recipe.training.eval_strategy != "no"


def _saves(recipe: Recipe, _: dict[str, Any]) -> bool:
    return recipe.training.save_strategy != "no"


def _chooses(recipe: Recipe, extra: dict[str, Any]) -> bool:
    best = recipe.training.load_best_model_at_end or recipe.training.save_strategy == "best"
    return best or recipe.training.lr_scheduler_type in BY_PLATEAU or "metric_for_best_model" in extra


def _has(name: str) -> Callable[[Recipe, dict[str, Any]], bool]:
    return lambda _, extra: bool(extra.get(name))


def _optimizer(parts: tuple[str, ...]) -> Callable[[Recipe, dict[str, Any]], bool]:
    return lambda recipe, _: any(part in recipe.training.optim for part in parts)


def _tracks(*names: str) -> Callable[[Recipe, dict[str, Any]], bool]:
    def tracks(recipe: Recipe, _: dict[str, Any]) -> bool:
        given = recipe.training.report_to
        return not {*names, "all"}.isdisjoint((given,) if isinstance(given, str) else given)

    return tracks


def _steps_by(parts: tuple[str, ...]) -> Callable[[TrainingSection], bool]:
    return lambda training: any(part in training.optim for part in parts)


def _logs_no_steps(training: TrainingSection) -> bool:
    # evaluations come at the steps of log lines where nothing else is said
    evaluates_by_them = training.eval_strategy == "steps" and training.eval_steps is None
    return _value(training, "logging_strategy") in ("no", "epoch") and not evaluates_by_them


def _warms_nothing_up(training: TrainingSection) -> bool:
    return training.lr_scheduler_type in ("constant", *BY_PLATEAU) and training.optim not in _WARM_UP


def _keeps_order(training: TrainingSection) -> bool:
    return bool(_value(training, "train_sampling_strategy") == "sequential")


def _value(training: TrainingSection, name: str) -> Any:
    """Of the section's own field, or of another name that is given."""
    return getattr(training, name, None)


_NEEDS: Final = (
    _Need("eval_delay metric_for_best_model", _evaluates, "evaluations; set training.eval_strategy", "eval_strategy"),
    _Need("push_to_hub", _saves, "checkpoints, which are what is pushed; set training.save_strategy"),
    _Need("greater_is_better", _chooses, "a best checkpoint; set training.load_best_model_at_end"),
    _Need(
        "eval_on_start",
        lambda recipe, _: bool(recipe.data.eval) or recipe.data.val_size is not None,
        "data.eval or data.val_size",
    ),
    _Need(
        "dataloader_persistent_workers dataloader_prefetch_factor",
        lambda recipe, _: recipe.training.dataloader_num_workers > 0,
        "training.dataloader_num_workers above 0",
        "dataloader_num_workers",
    ),
    _Need(
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy",
        _has("push_to_hub"),
        "training.push_to_hub",
        "push_to_hub",
    ),
    _Need("optim_args", _optimizer(_READ_ARGUMENTS), f"an optimizer that reads it: {', '.join(_READ_ARGUMENTS)}"),
    _Need("optim_target_modules", _optimizer(_READ_TARGETS), f"an optimizer that reads it: {', '.join(_READ_TARGETS)}"),
    _Need(
        "project trackio_bucket_id trackio_space_id trackio_static_space_id",
        _tracks("trackio"),
        "training.report_to: trackio",
        "report_to",
    ),
    _Need(
        "run_name",
        _tracks(*_NAMED_RUNS),
        f"a tracker that names runs; set training.report_to to one of {', '.join(_NAMED_RUNS)}",
        "report_to",
    ),
)

_CLASHES: Final = (
    _Clash("adam_beta1 adam_beta2", "optim", _steps_by(_WITHOUT_BETAS)),
    _Clash("adam_epsilon", "optim", _steps_by(_WITHOUT_EPSILON)),
    _Clash("warmup_steps", "lr_scheduler_type", _warms_nothing_up),
    _Clash("logging_steps", "logging_strategy", _logs_no_steps),
    _Clash("data_seed", "train_sampling_strategy", _keeps_order),
)

BESIDE: Final = frozenset(name for rule in (*_NEEDS, *_CLASHES) for name in rule.names.split())
"""The settings that are looked at here."""


def idle_settings(recipe: Recipe) -> Iterator[str]:
    """What is wrong with settings that nothing reads, or that read what nothing writes, one line each."""
    training = recipe.training
    extra = {name: value for name, value in (training.model_extra or {}).items() if value not in (None, False)}
    own = {name: getattr(training, name) for name in type(training).model_fields if differs(training, name)}
    given = {**own, **extra}
    for need in _NEEDS:
        for name in need.names.split():
            if name in given and not need.met(recipe, extra) and not is_off_on_purpose(training, need.switch):
                yield f"training.{name}: {json.dumps(given[name], default=str)} {_NO_ACT} {need.remedy}"
    for clash in _CLASHES:
        for name in clash.names.split():
            if name in given and clash.idle(training):
                yield (
                    f"training.{name}: {json.dumps(given[name], default=str)} {_NO_EFFECT} "
                    f"training.{clash.other}: {_value(training, clash.other)}; leave one of them out"
                )
    metric = extra.get("metric_for_best_model")
    logged = REWARDS if recipe.preference is not None else ()
    if metric is not None and str(metric).removeprefix("eval_") not in ("loss", *logged):
        expected = ", ".join(f"eval_{name}" for name in ("loss", *logged))
        yield f"training.metric_for_best_model: {metric} is nothing that an evaluation logs; expected {expected}"
    if extra.get("push_to_hub") and extra.get("hub_strategy") == "end":
        yield "training.hub_strategy: end cannot act here: what is pushed is checkpoints; use every_save or checkpoint"


def has_no_effect(finding: str) -> bool:
    """Whether a finding is about a setting that does nothing beside the others."""
    return _NO_EFFECT in finding or _NO_ACT in finding


def is_off_on_purpose(training: TrainingSection, switch: str | None) -> bool:
    """Whether a switch is given in the recipe, and off."""
    return switch in training.model_fields_set and _value(training, str(switch)) in (
        "no",
        "none",
        0,
        False,
        (),
        ("none",),
    )
