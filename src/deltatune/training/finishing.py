"""What a run leaves once its steps are done: the model, and the figures of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deltatune.errors import UserError
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.state import reshard
from deltatune.phases import phase
from deltatune.runs.card import model_card
from deltatune.runs.folder import read_run
from deltatune.training.building import Run
from deltatune.training.ending import ending, ending_lines
from deltatune.training.export import save_trained, write_json
from deltatune.training.trainer import PackedTrainer

__all__ = ["METRICS_FILE", "REPORT_FILE", "TrainResult", "check_finite", "finish"]

REPORT_FILE = "report.json"
METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run."""

    output_dir: Path  # where the adapter or model, its tokenizer and the run's records are
    metrics: dict[str, Any]  # as saved in metrics.json: losses, and the rates and counts of this leg
    log_history: list[dict[str, Any]]  # every log entry, in order


def finish(run: Run, trainer: PackedTrainer, evaluation: Mapping[str, Any], records: dict[str, Any]) -> TrainResult:
    """Saves the model and the run's figures, in that order: figures without a model would look like a finished run."""
    metrics = _metrics(run, trainer, evaluation)
    check_finite(run.model, run.mesh)
    state = trainer.whole_state() if run.mesh.shard_size > 1 else None
    if run.arguments.should_save:
        with phase("saving the model"):
            card = model_card(read_run(run.output_dir), metrics["saved_step"])
            said = save_trained(run.model, run.tokenizer, run.output_dir, run.loaded.origin, card, state)
        for line in said:
            run.console.out(line, highlight=False)
        # the compiler's account is complete only now
        write_json(run.output_dir / REPORT_FILE, {**records, "prepare": run.prepared.report.to_dict()})
        # a finished run that is resumed has nothing to measure: the figures of its training stay
        before = {} if metrics["leg"]["steps"] else _read(run.output_dir / METRICS_FILE)
        write_json(run.output_dir / METRICS_FILE, {**metrics, "leg": before.get("leg", metrics["leg"])})
    if not metrics["leg"]["steps"]:
        run.console.out("nothing was left to train; training.max_steps or num_train_epochs say how far to go")
    if trainer.skipped:
        steps = ", ".join(str(found.step) for found in trainer.skipped)
        run.console.out(f"updates that were left out, since a loss or gradient norm was no number: steps {steps}")
    for line in [*ending_lines(trainer), f"saved to {run.output_dir}"]:
        run.console.out(line, highlight=False)
    return TrainResult(run.output_dir, metrics, trainer.state.log_history)


def check_finite(model: nn.Module, mesh: Mesh) -> None:
    """Refuses, on every rank, to save weights over whatever was there before that no model should have."""
    reshard(model)
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
    if not parts:
        return
    broken = (~torch.stack([part.isfinite().all() for part in parts]).all()).long()
    if bool(mesh.sum_over_data(broken)):
        raise UserError(
            "some trained weights are not finite, so they are not saved; go on from a checkpoint before with another "
            "training.learning_rate"
        )


def _metrics(run: Run, trainer: PackedTrainer, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Of the model that is saved: its step and losses. ``leg``: of what this process trained of it."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    compiled = run.prepared.compile_report
    return {
        "global_step": trainer.state.global_step,
        "loss": losses[-1] if losses else None,
        **{f"eval_{name}": evaluation[f"eval_{name}"] for name in (*trainer.figures, trainer.counted) if evaluation},
        **ending(trainer),
        "leg": {
            **trainer.meter.summary(),
            "skipped_steps": len(trainer.skipped),
            "compile": None if compiled is None else compiled.to_dict(),
        },
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
