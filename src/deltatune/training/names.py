"""Names of optimizers, schedules and trackers that transformers knows, checked before it is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deltatune.config.rules import check_training_names
from deltatune.config.training_section import TrainingSection
from deltatune.errors import RecipeKeyError, nearest
from deltatune.hf.source import annotated_fields, enum_values, mapping_keys, schedule_arguments

__all__ = ["MUON", "check_names", "check_values"]

MUON: Final = "muon"
"""The name in ``training.optim`` that transformers does not have."""

_LOG_LEVELS: Final = ("passive", "detail", "debug", "info", "warning", "error", "critical")
# names that transformers looks up where they are used, or takes for something else
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"),
}
# where a schedule ends, in two ways
_ENDS: Final = ("min_lr", "min_lr_rate")
# parts of annotations -> what they are in words, and in Python
_TYPES: Final[Mapping[str, tuple[str, tuple[type, ...]]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("text", (str,)),
    "dict": ("a mapping", (Mapping,)),
    "list[str]": ("a list", (list, tuple)),
    "None": ("null", (type(None),)),
}


def check_names(section: TrainingSection) -> None:
    """The names of ``training``, and those of its values that are names themselves.

    Raises:
        RecipeKeyError: one that the installed transformers does not know, with the nearest that it does.
    """
    fields = annotated_fields("training_args.py", "TrainingArguments")
    if fields is not None:
        check_training_names(section, fields)
        _check_types(section, fields)
    check_values(section)


def check_values(section: TrainingSection) -> None:
    """Values of ``training`` that are names of transformers': of an optimizer, a schedule, a tracker, a strategy.

    Raises:
        RecipeKeyError: an unknown one, with the nearest; an argument that a schedule does not take, or lacks.
    """
    for key, value, known in _named(section):
        if known is not None and value not in known:
            raise RecipeKeyError(
                ("training", key),
                f"training.{key}: {value} is unknown{nearest(str(value), known)}; known: {', '.join(known)}",
            )
    _check_schedule_arguments(section)
    _check_optim_args(section)


def _check_types(section: TrainingSection, fields: Mapping[str, str]) -> None:
    """What TrainingArguments takes as it is, and is no number or no truth value where it is used."""
    for name, value in (section.model_extra or {}).items():
        if (expected := _misfit(value, fields[name])) is not None:
            raise RecipeKeyError(("training", name), f"training.{name}: expected {expected}, got {_shown(value)}")
    given = (section.model_extra or {}).get("accelerator_config")
    known = annotated_fields("trainer_pt_utils.py", "AcceleratorConfig")
    if not isinstance(given, dict) or known is None:
        return
    for name in given:
        if name not in known:
            raise RecipeKeyError(
                ("training", "accelerator_config"),
                f"training.accelerator_config: {name} is unknown{nearest(name, known)}; known: {', '.join(known)}",
            )


def _misfit(value: Any, annotation: str) -> str | None:
    """What a value should be that its annotation does not fit; None for one that fits, or where nothing says so."""
    parts = [_TYPES.get(part) for part in annotation.split(" | ")]
    known = [part for part in parts if part is not None]
    truths = any(bool in types for _, types in known)
    fits = any(isinstance(value, types) and (truths or not isinstance(value, bool)) for _, types in known)
    return " or ".join(words for words, _ in known) if len(known) == len(parts) and not fits else None


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _named(section: TrainingSection) -> Iterator[tuple[str, Any, tuple[str, ...] | None]]:
    """Keys, the names that were given to them, and the names that there are."""
    extra = section.model_extra or {}
    optimizers = enum_values("training_args.py", "OptimizerNames")
    yield "optim", section.optim, None if optimizers is None else (*optimizers, MUON)
    yield "lr_scheduler_type", section.lr_scheduler_type, enum_values("trainer_utils.py", "SchedulerType")
    yield from ((key, extra[key], known) for key, known in _CHOICES.items() if isinstance(extra.get(key), str))
    for key, name in (("logging_strategy", "IntervalStrategy"), ("hub_strategy", "HubStrategy")):
        if extra.get(key) is not None:
            yield key, extra[key], enum_values("trainer_utils.py", name)
    trackers = mapping_keys("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    given = (section.report_to,) if isinstance(section.report_to, str) else section.report_to
    if given not in (("none",), ("all",)):
        yield from (("report_to", name, trackers) for name in given)


def _check_schedule_arguments(section: TrainingSection) -> None:
    arguments = schedule_arguments(section.lr_scheduler_type)
    if arguments is None:
        return
    taken, required = arguments
    given = section.lr_scheduler_kwargs or {}
    key, schedule = ("training", "lr_scheduler_kwargs"), f"lr_scheduler_type: {section.lr_scheduler_type}"
    for name in given:
        if name not in taken:
            raise RecipeKeyError(
                key,
                f"training.lr_scheduler_kwargs: {schedule} takes no {name}{nearest(name, taken)}; it takes "
                f"{', '.join(taken)}",
            )
        if (expected := _misfit(given[name], taken[name])) is not None:
            raise RecipeKeyError(
                key, f"training.lr_scheduler_kwargs.{name}: expected {expected}, got {_shown(given[name])}"
            )
    if lacking := [name for name in required if name not in given]:
        raise RecipeKeyError(key, f"training.lr_scheduler_kwargs: {schedule} needs {', '.join(lacking)}")
    ends = [name for name in _ENDS if name in taken]
    if len(ends) > 1 and len([name for name in ends if given.get(name) is not None]) != 1:
        raise RecipeKeyError(key, f"training.lr_scheduler_kwargs: {schedule} needs one of {', '.join(ends)}")
    end = given.get("lr_end", 0.0)
    if isinstance(end, int | float) and end >= section.learning_rate > 0:
        raise RecipeKeyError(
            key,
            f"training.lr_scheduler_kwargs.lr_end: {end} must be below training.learning_rate: {section.learning_rate}",
        )


def _check_optim_args(section: TrainingSection) -> None:
    given = (section.model_extra or {}).get("optim_args")
    if given and not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in str(given).split(",")):
        raise RecipeKeyError(
            ("training", "optim_args"), f"training.optim_args: expected name=value,name=value, got {_shown(given)}"
        )
