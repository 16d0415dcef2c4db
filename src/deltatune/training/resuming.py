"""What goes on from a checkpoint, and under which settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments

from deltatune.errors import UserError, one_line
from deltatune.parallel.filling import from_rank_0
from deltatune.parallel.mesh import Launched, Mesh
from deltatune.training.batches import PackOrder, count_steps
from deltatune.training.early_stopping import EarlyStopping
from deltatune.training.export import write_json
from deltatune.training.sealed import damage_of, size_problem_of

__all__ = [
    "best_beside",
    "decided_by_rank_0",
    "found_by_rank_0",
    "make_valid_json",
    "no_step_left",
    "restore_settings",
    "state_of",
    "step_of",
]

_Answer = TypeVar("_Answer")

_STATE = "trainer_state.json"  # as transformers.trainer has it, which imports datasets and pandas


def state_of(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        UserError: another version of transformers wrote fields that this one does not have.
    """
    file = checkpoint / _STATE
    try:
        return TrainerState.load_from_json(str(file))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read by transformers {transformers.__version__}: {one_line(error)}; install the version "
            "that saved it, or go on from another checkpoint"
        ) from error


def make_valid_json(file: Path) -> None:
    """Writes a state that the Trainer saved as JSON: its numbers that are none (NaN, infinities) become text.

    The best figure that nothing has set yet is an infinity: null, by which the Trainer sets it again.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if not math.isfinite(found["best_metric"] or 0.0):
        found["best_metric"] = None
    write_json(file, found)


def found_by_rank_0(find: Callable[[], tuple[Path | None, list[str]]], mesh: Launched) -> tuple[Path | None, list[str]]:
    """What ``find`` answers, which reads every byte of a checkpoint, on rank 0; the others look at names and sizes.

    Raises:
        UserError: as by ``find``, or a rank that does not see the same checkpoint; on every rank.
    """
    checkpoint, passed_over = decided_by_rank_0(find, mesh)
    _check_seen(checkpoint, mesh)
    return checkpoint, passed_over


def decided_by_rank_0(decide: Callable[[], _Answer], mesh: Launched) -> _Answer:
    """What ``decide`` answers on rank 0, on every rank; every rank calls it.

    Args:
        decide: answers plain data; it runs on rank 0 alone.
        mesh: the processes.

    Raises:
        UserError: as by ``decide``, on every rank.
    """
    if mesh.world_size == 1:
        return decide()
    answer: Any = None
    failed: str | None = None
    if mesh.process_index == 0:
        try:
            answer = decide()
        except UserError as error:
            failed = str(error)
    answer, failed = from_rank_0((answer, failed))
    if failed is not None:
        raise UserError(failed)
    return cast("_Answer", answer)


def _check_seen(checkpoint: Path | None, mesh: Launched) -> None:
    """Refuses, on every rank, a checkpoint whose files are not of their sizes on all of them."""
    if checkpoint is None or mesh.world_size == 1:
        return
    problems: list[str | None] = [None] * mesh.world_size
    # rank 0 has read it
    dist.all_gather_object(problems, size_problem_of(checkpoint) if mesh.process_index else None)
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise UserError(
                f"rank {rank} does not see {checkpoint} as rank 0 does: {problem}; every process reads it, so put it "
                "on a disk that they share"
            )


def no_step_left(
    checkpoint: Path, num_packs: int, mesh: Mesh, arguments: TrainingArguments, stopping: EarlyStopping | None
) -> bool:
    """Whether a run has no step after a checkpoint; every rank calls this.

    Args:
        checkpoint: whose state is asked.
        num_packs: packs of an epoch.
        mesh: the processes, which share them.
        arguments: how far the run goes.
        stopping: what ends it earlier.
    """
    state = state_of(checkpoint)
    _, steps = count_steps(len(PackOrder(num_packs, mesh=mesh, drop_last=arguments.dataloader_drop_last)), arguments)
    if stopping is not None:
        stopping.restore(state)
    ended = state.global_step >= steps or (stopping is not None and stopping.stops)
    return decided_by_rank_0(lambda: ended, arguments)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at, whatever its folder is called."""
    return int(state_of(checkpoint).global_step)


def best_beside(checkpoint: Path, mesh: Launched) -> str | None:
    """The best checkpoint that a checkpoint's state names: beside it, or else where the state says.

    None if it is gone, or damaged: the Trainer would end with the last weights and call them the best. Rank 0 reads
    every byte of it, the others look at names and sizes; every rank calls this.

    The state holds the path as it was written then: the folder may have moved, or go by another path now.

    Raises:
        UserError: a state that cannot be read, or a rank that does not see the same checkpoint; on every rank.
    """
    best = decided_by_rank_0(lambda: _best_beside(checkpoint), mesh)
    _check_seen(best, mesh)
    return None if best is None else str(best)


def _best_beside(checkpoint: Path) -> Path | None:
    named = state_of(checkpoint).best_model_checkpoint
    if named is None:
        return None
    places = (checkpoint.parent / Path(named).name, Path(named))
    return next((place for place in places if damage_of(place) is None), None)


def restore_settings(optimizer: Optimizer, scheduler: Any, given: Sequence[Mapping[str, Any]]) -> None:
    """Puts back the settings of parameter groups that loading an optimizer's state has replaced by the saved ones.

    ``given``: the groups as they were built. Weight decay, betas and the like are set to them. The learning rate is
    that of the schedule as it is now (its kind, length and peak), at the step that was reached.
    """
    for group, built in zip(optimizer.param_groups, given, strict=True):
        group.update({name: value for name, value in built.items() if name not in ("lr", "initial_lr")})
    scheduler = getattr(scheduler, "scheduler", scheduler)  # out of accelerate's
    peaks = [built.get("initial_lr", built["lr"]) for built in given]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = list(peaks)
        rates = [peak * factor(scheduler.last_epoch) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
        for group, peak, rate in zip(optimizer.param_groups, peaks, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        scheduler._last_lr = rates
