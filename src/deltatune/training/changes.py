"""What a recipe says otherwise than the one that a checkpoint was saved under: what acts, and what cannot.

A setting is ``local`` where it says by which folders and processes of a machine a run works: neither weights nor
figures depend on it, and a run in a folder that has moved is the same run. It is ``moved`` where it names the same
weights or rows by another path, which no table of settings tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deltatune.config.idle import BY_PLATEAU
from deltatune.errors import UserError

__all__ = ["Change", "check_changes", "find_changes", "find_other_data"]

Verdict = Literal["acts", "local", "moved", "asks", "cannot"]

# of ``training``
_LOCAL = (
    *("output_dir", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "ddp_timeout"),
    *(f"dataloader_{name}" for name in ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")),
)
# by the longest key that a setting begins with
_VERDICTS: dict[str, Verdict] = {
    "model": "cannot",
    "model.quantization.compute": "acts",
    "model.tokenizer": "asks",
    "model.chat_template": "asks",
    "lora": "cannot",
    "lora.lora_dropout": "acts",
    "lora.impl": "acts",
    "data": "asks",
    "data.eval": "acts",
    "data.cache_dir": "local",
    "data.num_proc": "local",
    "packing": "asks",
    "preference": "asks",
    **dict.fromkeys((f"preference.{name}" for name in ("loss", "beta", "gamma", "label_smoothing")), "acts"),
    "kernels": "acts",
    "compile": "acts",
    "checkpointing": "acts",
    "activation_offloading": "acts",
    "parallel": "acts",
    "parallel.timeout_s": "local",
    "verify": "acts",
    "samples": "acts",
    "training": "acts",
    **dict.fromkeys((f"training.{name}" for name in _LOCAL), "local"),
    "training.optim": "cannot",
    "training.optim_args": "cannot",
    "training.optim_target_modules": "cannot",
    "training.unfrozen_parameters": "cannot",
    # the best figure so far is one of the other kind
    "training.metric_for_best_model": "cannot",
    "training.greater_is_better": "cannot",
    "training.learning_rates": "acts",
    "training.loraplus_lr_ratio": "acts",
    "training.gradient_accumulation_steps": "asks",
    "training.seed": "asks",
    "training.data_seed": "asks",
    "training.train_sampling_strategy": "asks",
    "training.dataloader_drop_last": "asks",
}
# what a schedule that follows evaluations carries in its own state
_BY_STATE = ("learning_rate", "learning_rates", "loraplus_lr_ratio", "loraplus_lr_embedding", "lr_scheduler_kwargs")
# what an evaluation is of
_EVALUATION = ("data.eval", "data.val_size")
# settings that make groups of parameters, whose number must stay, where they are given at all
_GROUPING = ("training.learning_rates", "training.loraplus_lr_ratio")


@dataclass(frozen=True)
class Change:
    """A setting that is another now."""

    key: str
    before: Any
    now: Any
    verdict: Verdict

    def __str__(self) -> str:
        before, now = (json.dumps(value, default=str) for value in (self.before, self.now))
        return f"{self.key}: {before} -> {now}"


def find_other_data(before: Mapping[str, str], now: Mapping[str, str], paths: Mapping[str, str]) -> list[Change]:
    """The sources whose rows are others than the ones that a checkpoint was trained on.

    Args:
        before: the digests of rows, by ``data.train.0`` and the like.
        now: the same.
        paths: of the sources that go by the path that they had.
    """
    return [
        Change(f"rows of {path}", before[place], now[place], "asks")
        for place, path in paths.items()
        if place in before and place in now and before[place] != now[place]
    ]


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The settings that differ between two recipes, as ``Recipe.model_dump(mode="json")`` gives them."""
    fixed = _fixed(_training(before), _training(now))
    return [
        Change(key, old, new, "cannot" if key.startswith(fixed) else _verdict(key, old, new))
        for key, old, new in _differences(before, now, ())
        if _home(key) in _VERDICTS
    ]


def _training(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    found = recipe.get("training")
    return found if isinstance(found, Mapping) else {}


def _fixed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What cannot act beside other settings of ``training``: keys, or what they begin with.

    A schedule by evaluations goes on with the learning rates and arguments in its state, which no other kind has; and
    the best figure so far is one of the held-out data before.
    """
    schedules = [training.get("lr_scheduler_type") in BY_PLATEAU for training in (before, now)]
    names = (*_BY_STATE, "lr_scheduler_type") if any(schedules) else ()
    compared = before.get("eval_strategy", "no") != "no" and (any(schedules) or _compares(now))
    return (*(f"training.{name}" for name in names), *(_EVALUATION if compared else ()))


def _compares(training: Mapping[str, Any]) -> bool:
    """Whether a run holds an evaluation against those before it."""
    stops = training.get("early_stopping_patience") is not None
    return stops or bool(training.get("load_best_model_at_end")) or training.get("save_strategy") == "best"


def _verdict(key: str, old: Any, new: Any) -> Verdict:
    if _home(key) in _GROUPING and (old in (None, {})) != (new in (None, {})):
        return "cannot"
    return _VERDICTS[_home(key)]


def check_changes(changes: list[Change], *, allow: bool) -> None:
    """Refuses what cannot act in a run that goes on, and asks for a word where the data would be other data.

    Raises:
        UserError: a setting of either kind, with the remedy.
    """
    if fixed := [change for change in changes if change.verdict == "cannot"]:
        raise UserError(
            f"{fixed[0]} cannot act on a run that goes on: the checkpoint was trained with the first; set it back, or "
            "start another run in another training.output_dir"
        )
    asking = [change for change in changes if change.verdict == "asks"]
    if asking and not allow:
        raise UserError(
            f"{asking[0]} makes the run go on with other packs, or in another place of them, than it would have; set "
            "it back, or say --allow-change"
        )


def _differences(before: Any, now: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), (*path, name))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, (*path, str(index)))
    elif before != now:
        yield ".".join(path), before, now


def _home(key: str) -> str:
    parts = key.split(".")
    known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in known if name in _VERDICTS), "")
