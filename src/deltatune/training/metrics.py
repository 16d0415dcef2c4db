"""What a run achieves: tokens per second, fill, memory, MFU, recompiles; counted on the CPU, read when logging.

The FLOPs of MFU are the model's: what the mathematics asks for, whatever is recomputed or padded.
"""

# n document length

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from deltatune.compile.memory import layer_cost
from deltatune.hf.model import head_of, text_model
from deltatune.parallel.mesh import ALONE, Mesh
from deltatune.training.batches import PackCounts
from deltatune.training.waiting import ForwardTimes, waiting_share

__all__ = ["PEAK_FLOPS", "Meter", "MeterReading", "StepFlops", "peak_flops"]

WARM_UP_STEPS = 2
"""Steps left out of the steady rate: they compile, and the allocator and the autotuners settle in them."""


PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense 16-bit matrix FLOP/s with 32-bit sums, by a part of the device's name; from the makers' data sheets."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's 16-bit matrix FLOP/s; None where it is not known, or for a 32-bit model."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward as ``per_token * tokens + per_square * sum(n**2)`` over documents of length n.

    A matrix of N weights costs ``2N`` a token forward, ``2N`` for the input's gradient, and ``2N`` more for its own
    where it trains. Routed experts count with the share of them that a token visits. Attention and the gated delta rule
    cost what their layers' ``cost`` says forward, and twice that backward.
    Recomputation by checkpointing is not counted, nor is padding: this is the work that trains.
    """

    per_token: float
    per_square: float

    @classmethod
    def of(cls, model: nn.Module) -> StepFlops:
        """The FLOPs of a prepared language model, adapters included; embeddings are lookups and cost nothing."""
        shares = _active_shares(model)
        matrices = sum(
            (6.0 if weight.requires_grad else 4.0) * weight.numel() * shares.get(weight, 1.0)
            for weight in _matrices(model)
        )
        # forward, and twice that backward
        return cls(matrices + 3 * layer_cost(model, tokens=1).flops, 3 * layer_cost(model, squares=1).flops)

    def __call__(self, counts: PackCounts) -> float:
        """FLOPs of the batches counted."""
        return self.per_token * counts.tokens + self.per_square * counts.squares


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights that multiply activations in a text-only step: of linear layers (a tied head once) and of experts."""
    text, head = text_model(model), head_of(model)
    weights = dict.fromkeys([*text.parameters(), *(() if head is None else head.parameters())])
    lookups = {module.weight for module in text.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        lookups.discard(head.weight)
    # a depthwise convolution's weight is [D, 1, W]: its work is the size of an elementwise pass
    kept = [weight for weight in weights if weight.ndim == 2 or (weight.ndim == 3 and weight.shape[1] != 1)]
    return [weight for weight in kept if weight not in lookups]


def _active_shares(model: nn.Module) -> dict[nn.Parameter, float]:
    """The share of a weight that a token meets, where that is not all of it: routed experts."""
    found: dict[nn.Parameter, float] = {}
    for module in model.modules():
        share = getattr(module, "active_share", None)
        if isinstance(share, float):
            routed = getattr(module, "routed_parameters", None)
            found |= dict.fromkeys(module.parameters(recurse=False) if routed is None else routed(), share)
    return found


@dataclass(frozen=True)
class MeterReading:
    """What a run has counted up to a moment, or between two; seconds exclude evaluation and checkpoints."""

    counts: PackCounts
    seconds: float
    steps: int

    def __add__(self, other: MeterReading) -> MeterReading:
        return MeterReading(self.counts + other.counts, self.seconds + other.seconds, self.steps + other.steps)

    def rates(self) -> dict[str, float]:
        """Trained and document tokens per second, and the share of token slots that held documents."""
        if not self.counts.capacity or self.seconds <= 0:
            return {}
        return {
            "trained_tokens_per_second": round(self.counts.trained / self.seconds, 1),
            "tokens_per_second": round(self.counts.tokens / self.seconds, 1),
            "fill": round(self.counts.tokens / self.counts.capacity, 4),
        }


class Meter(TrainerCallback):  # type: ignore[misc]
    """Adds up what training steps hold and how long they take.

    Adding costs a few integer additions and never waits for the device. Reading is for logging steps, where the
    Trainer has just waited for the loss: there it makes two small reductions over ranks, if there are several.

    The model's matrices give the FLOPs, which the peak of ``device`` for products in ``dtype`` makes a share.
    ``recompiles`` counts graphs compiled after the first ones, so far; None where nothing is compiled.

    Attributes:
        logged: what was counted on all ranks up to the last window.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        recompiles: Callable[[], int] | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        self.flops = StepFlops.of(model)
        self._device = device
        self._peak = peak_flops(device, dtype)
        self._recompiles = recompiles
        self._mesh = mesh
        self._times = ForwardTimes(device)
        self.on_train_begin()

    def on_train_begin(self, *_: Any, **_kwargs: Any) -> None:
        """Begins to count: the first batch is about to be fetched."""
        self._counts, self._steps, self._paused = PackCounts(), 0, 0.0
        self._began = self._window_began = self._now()
        self._warm: MeterReading | None = None
        self._times.clear()
        self.logged = MeterReading(PackCounts(), 0.0, 0)

    def add(self, counts: PackCounts) -> None:
        """The batches of one optimizer step on this data rank, whole also where several ranks hold each."""
        self._counts += counts

    @property
    def steps(self) -> int:
        """Optimizer steps since this process began to train, not those before a checkpoint that it resumed from."""
        return self._steps

    def forward(self) -> AbstractContextManager[None]:
        """Within, the forward pass of a micro-batch; several ranks are compared by what theirs take."""
        return nullcontext() if self._mesh.size == 1 else self._times.forward()

    def on_step_end(self, *_: Any, **_kwargs: Any) -> None:
        """An optimizer step is done (launched, on an asynchronous device)."""
        self._steps += 1
        self._times.end_step()
        if self._steps == WARM_UP_STEPS:
            # the only wait outside logging: without it the steady rate would begin inside the warm-up
            self._synchronize()
            self._warm = self._now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and checkpoints: time that is not training's."""
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        self._paused += time.perf_counter() - begin

    def window(self) -> dict[str, float]:
        """Metrics since the last call, for a log line."""
        reading = self._since(self._window_began)
        self._window_began = self._now()
        self.logged += reading
        return {**reading.rates(), **self._utilization(reading), **self._state(self._times.take())}

    def summary(self) -> dict[str, float]:
        """Metrics since this process began to train; ``steady_`` ones leave out the first steps, which compile."""
        self._synchronize()
        whole = self._since(self._began)
        metrics: dict[str, float] = {
            "steps": whole.steps,
            "seconds": round(whole.seconds, 3),
            "packs": whole.counts.packs,
            "trained_tokens": whole.counts.trained,
            "tokens": whole.counts.tokens,
            **whole.rates(),
            **self._state(),
        }
        if self._warm is not None and self._steps > WARM_UP_STEPS:
            steady = self._since(self._warm)
            metrics |= {f"steady_{name}": value for name, value in steady.rates().items() if name != "fill"}
            metrics |= self._utilization(steady)
        return metrics

    def _now(self) -> MeterReading:
        return MeterReading(self._counts, time.perf_counter() - self._paused, self._steps)

    def _since(self, before: MeterReading) -> MeterReading:
        """What came after a moment, on all ranks."""
        now = self._now()
        counts = now.counts - before.counts
        if self._mesh.size > 1:
            fields = torch.tensor(dataclasses.astuple(counts), dtype=torch.int64, device=self._device)
            counts = PackCounts(*self._mesh.sum_over_data(fields).tolist())
        return MeterReading(counts, now.seconds - before.seconds, now.steps - before.steps)

    def _utilization(self, reading: MeterReading) -> dict[str, float]:
        if self._peak is None or reading.seconds <= 0 or not reading.counts.tokens:
            return {}
        return {"mfu": round(self.flops(reading.counts) / (reading.seconds * self._peak * self._mesh.size), 4)}

    def _state(self, forward: Sequence[float] = ()) -> dict[str, float]:
        """The most memory held so far (of the allocator on a GPU, of the process on a CPU), and recompiles.

        Of several ranks the largest and the sum, and which share of the time they wait for the slowest, by the seconds
        that the steps' forward passes took on this one.
        """
        if self._device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            # kilobytes on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        rows = self._of_ranks([peak_bytes, *forward])
        peaks, share = [row[0] for row in rows], waiting_share([row[1:] for row in rows])
        state: dict[str, float] = {"peak_memory_gib": round(max(peaks) / 2**30, 3)}
        if len(rows) > 1:
            state["peak_memory_sum_gib"] = round(sum(peaks) / 2**30, 3)
        if len(rows) > 1 and share is not None:
            state["waiting_share"] = round(share, 4)
        if self._recompiles is not None:
            state["recompiles"] = self._recompiles()
        return state

    def _of_ranks(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each rank."""
        if self._mesh.size == 1:
            return [list(values)]
        rows = torch.zeros(self._mesh.size, len(values), dtype=torch.float64, device=self._device)
        rows[self._mesh.rank] = torch.tensor(values, dtype=torch.float64)
        found: list[list[float]] = self._mesh.sum_over_ranks(rows).tolist()
        return found

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
