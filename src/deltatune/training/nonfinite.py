"""Losses and gradient norms that are no numbers: at which step, in which rows, and what becomes of that step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltatune.packing.sequences import Sequences
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.state import whole_tensor
from deltatune.training.batches import PackOrigins
from deltatune.training.export import write_json

__all__ = ["MOST_SKIPPED", "Finding", "FiniteWatch", "OnNonFinite", "dump_step"]

OnNonFinite = Literal["stop", "skip", "dump"]

MOST_SKIPPED = 10
"""Steps in a row that ``skip`` leaves out; where the next is no better, training will not mend itself."""

_MOST_KEPT = 1000  # steps whose figures wait to be read: a few kilobytes each
_MOST_NAMED = 3  # rows in a message; a dump names all


@dataclass
class _Step:
    number: int
    packs: Sequence[PackOrigins]
    losses: list[Tensor] = field(default_factory=list)  # of each pack, on the device
    norm: Tensor | None = None


@dataclass(frozen=True)
class Finding:
    """The first step whose figures are no numbers.

    Attributes:
        step: its number, as log lines have it.
        what: the figure that is none, in words.
        rows: where the documents of its packs are from: of the packs whose loss is none, if there are such.
        losses: of each pack, its share of the step's.
    """

    step: int
    what: str
    rows: tuple[str, ...]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        more = f" and {len(self.rows) - _MOST_NAMED} more" if len(self.rows) > _MOST_NAMED else ""
        rows = f" ({'; '.join(self.rows[:_MOST_NAMED])}{more})" if self.rows else ""
        return f"{self.what} at step {self.step}{rows}"


class FiniteWatch:
    """Keeps the losses and gradient norms of steps on the device until somebody reads them.

    Noting launches a copy of one number a pack and waits for nothing. ``read`` waits for the device, once for all steps
    since the last time, so it belongs where the trainer waits anyway.

    Args:
        mesh: the ranks, which find the same step and each name their own rows.
        where: a document's origin in words.
    """

    def __init__(self, mesh: Mesh, where: Callable[[Any], str]) -> None:
        self._mesh, self._where = mesh, where
        self._steps: list[_Step] = []

    @property
    def is_full(self) -> bool:
        """Whether the figures should be read, whoever waits for it."""
        return len(self._steps) >= _MOST_KEPT

    @property
    def has_losses(self) -> bool:
        """Whether the step that runs has a loss yet."""
        return bool(self._steps and self._steps[-1].losses)

    def begin(self, step: int, packs: Sequence[PackOrigins]) -> None:
        """A step of these packs begins."""
        self._steps.append(_Step(step, packs))

    def add_loss(self, loss: Tensor) -> None:
        """A pack's loss, in the order of the packs."""
        self._steps[-1].losses.append(loss.detach().float().clone())

    def add_norm(self, norm: Tensor | float | None) -> None:
        """The norm of the step's gradients, where it is known."""
        if isinstance(norm, Tensor):
            self._steps[-1].norm = whole_tensor(norm).detach().float().reshape(()).clone()
        elif norm is not None:
            self._steps[-1].norm = torch.tensor(norm)

    def read(self) -> Finding | None:
        """The first of the steps since the last time whose loss or gradient norm is no number, on any rank."""
        steps, self._steps = [step for step in self._steps if step.losses], []
        if not steps:
            return None
        device = steps[0].losses[0].device
        figures = [figure for step in steps for figure in (*step.losses, *([] if step.norm is None else [step.norm]))]
        values = iter(torch.stack([figure.to(device) for figure in figures]).tolist())
        found = None
        for step in steps:
            losses = tuple(next(values) for _ in step.losses)
            norm = 0.0 if step.norm is None else next(values)
            if found is None and not all(map(math.isfinite, (*losses, norm))):
                found = self._finding(step, losses, norm)
        return self._of_all_ranks(found, device)

    def _finding(self, step: _Step, losses: tuple[float, ...], norm: float) -> Finding:
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        what = f"the loss is {losses[bad[0]]}" if bad else f"the gradient norm is {norm}"
        return Finding(step.number, what, self.rows_of([step.packs[n] for n in bad] or step.packs), losses)

    def rows_of(self, packs: Sequence[PackOrigins]) -> tuple[str, ...]:
        """The rows that the documents of packs come from, each once."""
        origins = (origin for pack in packs for origin in pack.documents)
        return tuple(dict.fromkeys(self._where(origin) for origin in origins if origin is not None))

    def _of_all_ranks(self, found: Finding | None, device: torch.device) -> Finding | None:
        """The earliest finding: ranks that went on alone would wait for those that stop."""
        if self._mesh.size == 1:
            return found
        steps = torch.zeros(self._mesh.size, dtype=torch.int64, device=device)
        steps[self._mesh.rank] = 0 if found is None else found.step
        others = [step for step in self._mesh.sum_over_ranks(steps).tolist() if step]
        if not others or (found is not None and found.step == min(others)):
            return found
        return Finding(min(others), "the loss of another rank is not finite", (), ())


def dump_step(
    folder: Path, finding: Finding, batches: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[str]]
) -> None:
    """Writes the packs of a step: ``pack-N.safetensors`` for each, and ``step.json``, which names their rows.

    A file holds ``input_ids``, ``labels`` and ``position_ids`` ``[1, T]`` and ``cu_seqlens`` ``[documents + 1]``, all
    that the model was called with. ``rows`` names those of each pack.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for number, (batch, of_pack) in enumerate(zip(batches, rows, strict=True)):
        tensors = {name: value.cpu().contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
        sequences = batch.get("sequences")
        if isinstance(sequences, Sequences):
            tensors["cu_seqlens"] = sequences.cu_seqlens_cpu[: sequences.num_sequences + 1].clone()
        name = f"pack-{number}.safetensors"
        save_file(tensors, folder / name)
        loss = finding.losses[number] if finding.losses else None
        described.append({"file": name, "loss": loss, "documents": list(of_pack)})
    write_json(folder / "step.json", {"step": finding.step, "what": finding.what, "packs": described})
