"""Settings of the training loop that act only beside another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from deltatune.config.rewards import REWARDS
from deltatune.config.schema import Recipe

__all__ = ["BY_PLATEAU", "idle_settings"]

BY_PLATEAU: Final = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow evaluations rather than steps."""

# parts of the names of optimizers that read optim_args, and optim_target_modules
_READ_ARGUMENTS: Final = (
    *("ademamix", "adagrad", "anyprecision", "apollo", "galore", "grokadamw", "rmsprop", "schedule_free", "sgd"),
    *("stable_adamw", "torch_4bit", "torch_8bit"),
)
_READ_TARGETS: Final = ("apollo", "galore")


@dataclass(frozen=True)
class _Need:
    names: str  # of settings, beside the section's own fields
    met: Callable[[Recipe, dict[str, Any]], bool]  # by the recipe, and by these settings
    remedy: str


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


def _tracks(recipe: Recipe, _: dict[str, Any]) -> bool:
    trackers = recipe.training.report_to
    return "trackio" in trackers or "all" in trackers


_NEEDS: Final = (
    _Need("eval_delay metric_for_best_model", _evaluates, "evaluations; set training.eval_strategy"),
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
    ),
    _Need(
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy",
        _has("push_to_hub"),
        "training.push_to_hub",
    ),
    _Need("optim_args", _optimizer(_READ_ARGUMENTS), f"an optimizer that reads it: {', '.join(_READ_ARGUMENTS)}"),
    _Need("optim_target_modules", _optimizer(_READ_TARGETS), f"an optimizer that reads it: {', '.join(_READ_TARGETS)}"),
    _Need("project trackio_bucket_id trackio_space_id trackio_static_space_id", _tracks, "training.report_to: trackio"),
)


def idle_settings(recipe: Recipe) -> Iterator[str]:
    """What is wrong with settings that nothing reads, or that read what nothing writes, one line each."""
    extra = {name: value for name, value in (recipe.training.model_extra or {}).items() if value not in (None, False)}
    for need in _NEEDS:
        for name in need.names.split():
            if name in extra and not need.met(recipe, extra):
                yield f"training.{name}: {json.dumps(extra[name], default=str)} cannot act without {need.remedy}"
    metric = extra.get("metric_for_best_model")
    logged = REWARDS if recipe.preference is not None else ()
    if metric is not None and str(metric).removeprefix("eval_") not in ("loss", *logged):
        expected = ", ".join(f"eval_{name}" for name in ("loss", *logged))
        yield f"training.metric_for_best_model: {metric} is nothing that an evaluation logs; expected {expected}"
    if extra.get("hub_strategy") == "end":
        yield "training.hub_strategy: end cannot act here: what is pushed is checkpoints; use every_save or checkpoint"
