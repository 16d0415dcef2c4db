"""What a system must show before it is timed: gates that hold it to the truth and the stock path of its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from deltatune.bench.gates import (
    Gate,
    Observation,
    against_stock,
    against_truth,
    bounds_from,
    leak_gate,
    observe,
    sample_documents,
    stock_gates,
    truth,
)
from deltatune.bench.models import Targets, adapters
from deltatune.bench.race import failures, host_sync, outcome_of
from deltatune.bench.systems import System
from deltatune.bench.workload import Batch, Workload, draw_lengths

__all__ = ["SYNC_GATE", "Judge"]

SYNC_GATE: Final = "no host sync"
"""The gate whose failure leaves a time its worth: it is a figure of its own."""
#: Tokens of the longest document that goes through the stock model in float32, as one of a batch as long at most.
_LONGEST_TRUTH: Final = 4096


@dataclass(frozen=True)
class _Known:
    """What gates hold systems to, for one choice of targets.

    Attributes:
        true: the sampled documents in float32.
        stock: the gates' batch through the stock path.
        pack: the timed batch through the stock path: the same, unless its documents are too long for float32.
        trusted: whether the stock path passed its own gates.
    """

    true: Observation
    stock: Observation
    pack: Observation
    trusted: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """How far apart two right paths may be: token losses, gradients."""
        return bounds_from(self.stock, self.true)


class Judge:
    """Knows the truth and the stock path for each choice of targets, and holds systems to them.

    Attributes:
        gates: of everything judged so far.
        documents: those that are held to the truth, by their number in the gates' batch.
    """

    def __init__(self, workload: Workload, device: torch.device, *, compiled: bool) -> None:
        """``workload``: what is timed. ``compiled``: ours has graphs, which are held to the same layers without."""
        self.gates: list[Gate] = []
        self._workload, self._device, self._compiled = workload, device, compiled
        self._near = workload
        if min(workload.lengths) > _LONGEST_TRUTH:
            lengths = draw_lengths(_LONGEST_TRUTH, seed=workload.seed)
            self._near = Workload(tuple(lengths), workload.vocab_size, workload.seed)
        self.documents = sample_documents(self._near.lengths)
        self._known: dict[Targets, _Known] = {}
        self._checked: dict[tuple[str, Targets, str], Sequence[Gate]] = {}
        self._uncompiled: dict[tuple[Targets, str], Observation] = {}

    @property
    def ok(self) -> bool:
        """Whether every gate held."""
        return all(gate.ok for gate in self.gates)

    def knows(self, targets: Targets) -> bool:
        """Whether there is anything to hold systems with these targets to."""
        return targets in self._known

    def gradient_bound(self, targets: Targets) -> float:
        """How far apart the adapter gradients of two right paths may be, as ``gates.relative`` measures it."""
        return self._known[targets].bounds[1]

    def truth_of(self, reference: System) -> Observation:
        """The sampled documents through the stock model in float32."""
        return truth(reference, self._batch(self._near), self.documents)

    def learn(self, stock: System, true: Observation) -> None:
        """Holds the stock path to ``true``; from then on systems with its targets are held to both."""
        seen = observe(stock, self._batch(self._near), self.documents)
        pack = seen if self._near is self._workload else observe(stock, self._batch(self._workload), [])
        found = [leak_gate(stock), *stock_gates(stock.setting.name, seen, true)]
        self.gates += found
        self._known[stock.setting.targets] = _Known(true, seen, pack, all(gate.ok for gate in found))

    def learned_nothing(self, targets: Targets, error: Exception) -> None:
        """The gate of a truth or a stock path that could not be measured."""
        self.gates.append(Gate("stock path", f"stock {targets}", False, None, None, ": ".join(outcome_of(error))))

    def distrusts(self, targets: Targets) -> tuple[str, str] | None:
        """``(status, reason)`` where nothing can be said of systems with these targets."""
        known = self._known.get(targets)
        if known is None or not known.trusted:
            return "red gate", "the stock path itself did not pass its gates"
        return None

    def refuses(self, system: System) -> tuple[str, str] | None:
        """Runs the gates of a system that has taken its first step: ``(status, reason)`` where one is red."""
        try:
            found = self._gates_of(system)
        except failures() as error:
            return outcome_of(error)
        self.gates += found
        red = [gate.name for gate in found if not gate.ok and gate.name != SYNC_GATE]
        return ("red gate", f"not timed: {', '.join(red)}") if red else None

    def _gates_of(self, system: System) -> list[Gate]:
        """Those of one system; what is known to leak is measured for the record and not held to anything."""
        setting, known = system.setting, self._known[system.setting.targets]
        if setting.system in ("stock", "stock as shipped"):
            # the first has been held to its gates before, the other is known to leak and is timed as it is
            return []
        batch, name = self._batch(self._workload), setting.name
        near, ours = self._observe(system, batch)
        found = against_truth(name, near, known.stock, known.true)
        found += against_stock(name, ours, known.pack, known.bounds)
        if self._compiled and system.prepared is not None:
            eager = self._eager(system, batch)
            found += against_stock(name, ours, eager, known.bounds, label="the same uncompiled")
        key = (setting.system, setting.targets, setting.lora)
        if key not in self._checked:
            # the same modules whatever is recomputed, so one red check closes every setting
            self._checked[key] = [leak_gate(system), *self._moved(system, batch)]
        found += (replace(gate, subject=name) for gate in self._checked[key])
        if system.prepared is not None:
            reason = host_sync(system, self._workload)
            found.append(Gate(SYNC_GATE, name, reason is None, None, None, reason or ""))
        return found

    def _observe(self, system: System, batch: Batch) -> tuple[Observation, Observation]:
        """The gates' batch and the timed one."""
        if self._near is self._workload:
            seen = observe(system, batch, self.documents)
            return seen, seen
        # another shape would be another graph
        with system.eager():
            near = observe(system, self._batch(self._near), self.documents)
        return near, observe(system, batch, [])

    def _eager(self, system: System, batch: Batch) -> Observation:
        """What ours makes of the pack uncompiled: the same whatever is recomputed."""
        key = system.setting.targets, system.setting.lora
        if key not in self._uncompiled:
            with system.eager():
                self._uncompiled[key] = observe(system, batch, [])
        return self._uncompiled[key]

    def _moved(self, system: System, batch: Batch) -> list[Gate]:
        """Ours once its adapters have been written in place, as an optimizer does: graphs must see the new ones.

        In one module A changes its sign, in the next B, so all that the adapters add does. Random adapters are as
        likely with one sign as with the other: the bounds hold as they did, and a graph that kept old ones of either
        kind is off by twice what their modules add.
        """
        if not self._compiled or system.prepared is None:
            return []
        named = adapters(system.model)
        modules = list(dict.fromkeys(_module_of(name) for name, _ in named))
        turned: list[Tensor] = [
            value for name, value in named if (".lora_A." in name) == (modules.index(_module_of(name)) % 2 == 0)
        ]
        _turn(turned)
        try:
            ours = observe(system, batch, [])
            with system.eager():
                eager = observe(system, batch, [])
        finally:
            _turn(turned)
        bounds = self._known[system.setting.targets].bounds
        return against_stock(system.setting.name, ours, eager, bounds, label="the same uncompiled, adapters turned")

    def _batch(self, workload: Workload) -> Batch:
        return workload.batch(0).to(self._device)


def _module_of(adapter: str) -> str:
    return adapter.rpartition(".lora_")[0]


@torch.no_grad()
def _turn(parameters: list[Tensor]) -> None:
    """Changes their signs in place, which is exact."""
    torch._foreach_neg_(parameters)
