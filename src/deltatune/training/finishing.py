"""What is said of a run once its steps are done: its figures, and whether its weights are numbers."""

from __future__ import annotations

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
from deltatune.training.building import Run
from deltatune.training.ending import ending
from deltatune.training.trainer import PackedTrainer

__all__ = ["METRICS_FILE", "REPORT_FILE", "TrainResult", "check_finite", "metrics_of"]

REPORT_FILE = "report.json"
METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run."""

    output_dir: Path  # where the adapter or model, its tokenizer and the run's records are
    metrics: dict[str, Any]  # as saved in metrics.json: losses, and the rates and counts of this leg
    log_history: list[dict[str, Any]]  # every log entry, in order


def check_finite(model: nn.Module, mesh: Mesh) -> None:
    """Refuses, on every rank, to save weights over whatever was there before that no model should have."""
    reshard(model)
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
    if not parts:
        return
    broken = (~torch.stack([part.isfinite().all() for part in parts]).all()).long()
    if bool(mesh.sum_over_ranks(broken)):
        raise UserError(
            "some trained weights are not finite, so they are not saved; go on from a checkpoint before with another "
            "training.learning_rate"
        )


def metrics_of(run: Run, trainer: PackedTrainer, evaluation: Mapping[str, Any]) -> dict[str, Any]:
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
