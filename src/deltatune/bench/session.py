"""One configuration from weights to figures: gates first, then the systems that passed them, in turn."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from deltatune.bench.baselines import fused_loss
from deltatune.bench.child import COMPILED, in_child
from deltatune.bench.floor import Floor, arithmetic_floor
from deltatune.bench.gates import Gate
from deltatune.bench.judge import SYNC_GATE, Judge
from deltatune.bench.kernels import kernel_table
from deltatune.bench.models import Targets, adapters, storage_bytes
from deltatune.bench.protocol import synchronize
from deltatune.bench.race import Laps, failures, first_step, outcome_of, race
from deltatune.bench.shapes import Shape, build_model
from deltatune.bench.systems import Adapters, Setting, System, build_system
from deltatune.bench.workload import Workload
from deltatune.compile.graphs import CompileOptions
from deltatune.compile.memory import device_memory
from deltatune.training.flops import StepFlops, peak_flops

__all__ = ["Plan", "Session"]

WHOLE_GATE: Final = "no break, no recompile"
"""Held after the timed steps: its failure leaves a time its worth, and is a figure of its own."""
#: Of the device's memory, for frozen weights: the model's, and those that systems hold of their own.
_WEIGHTS_SHARE: Final = 0.3


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shape: the model's.
        layers: its depth.
        lengths: documents of a batch.
        settings: the systems, in order.
        lora: adapters of all of them.
        options: how ours is compiled; None runs it eagerly.
        device: where.
        dtype: of weights and activations.
        warmup: steps before timing.
        steps: samples of each system.
        rounds: turns they are spread over.
        seed: of weights, adapters and tokens.
        compile_limit_seconds: of the first step of what runs in a process of its own.
        cold_layers: depth at which the first setting of ours starts twice in new processes, without compiled graphs
            on disk and with; None leaves that out.
        floor: measure the arithmetic floor.
        kernels: profile a step of ours: ``"fastest"`` for each choice of targets, ``"all"``, or None for no step.
    """

    shape: Shape
    layers: int
    lengths: tuple[int, ...]
    settings: tuple[Setting, ...]
    lora: Adapters
    options: CompileOptions | None
    device: torch.device
    dtype: torch.dtype
    warmup: int
    steps: int
    rounds: int
    seed: int
    compile_limit_seconds: float
    cold_layers: int | None
    floor: bool
    kernels: Literal["fastest", "all"] | None


class Session:
    """Runs a plan; ``results``, ``cold_starts``, ``floor``, ``kernels`` and ``judge.gates`` fill as it goes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.base = build_model(plan.shape, plan.device, layers=plan.layers, dtype=plan.dtype, seed=plan.seed)
        pin = plan.device.type == "cuda"
        self.workload = Workload(plan.lengths, self.base.config.vocab_size, plan.seed, pin)
        self.results: list[dict[str, Any]] = []
        self.cold_starts: list[dict[str, Any]] = []
        self.floor: Floor | None = None
        self.no_floor: str | None = None
        self.kernels: dict[str, dict[str, Any]] = {}
        self.kernels_failure: dict[str, str] = {}
        self.loss_name = fused_loss(plan.device)[0]
        self.judge = Judge(self.workload, plan.device, compiled=plan.options is not None)

    def run(self) -> None:
        """Gates, floor, systems in turn, a profile, and what runs in processes of its own."""
        for targets in dict.fromkeys(setting.targets for setting in self.plan.settings):
            try:
                self._measure_stock(targets)
            except failures() as error:
                self.judge.learned_nothing(targets, error)
            self._forget()
        for group in self._groups():
            self._run_group(group)
        self.base.to("meta")  # its memory is for what runs in processes of its own
        for setting in self.plan.settings:
            if setting.system == COMPILED and self.judge.knows(setting.targets):
                self.results.append(self._child(setting, self.plan.layers))
        ours = [setting for setting in self.plan.settings if setting.system == "deltatune"]
        if self.plan.cold_layers is not None and ours and self.judge.knows(ours[0].targets):
            with tempfile.TemporaryDirectory() as graphs:
                for caches in ("cold", "warm"):
                    self.cold_starts.append(self._child(ours[0], self.plan.cold_layers, caches, Path(graphs)))

    def _measure_stock(self, targets: Targets) -> None:
        """The truth, the stock path, and the floor of the first targets."""
        _say(f"gates: float32 on documents {self.judge.documents}, adapters on {targets}")
        system = self._build(Setting("reference", targets=targets))
        true = self.judge.truth_of(system)
        del system
        self._forget()
        _say("gates: the stock path")
        system = self._build(Setting("stock", "layer", targets))
        self.judge.learn(system, true)
        if self.plan.floor and targets == self._floor_targets:
            _say("floor")
            sequences = self.workload.batch(0).to(self.plan.device).sequences
            try:
                self.floor = arithmetic_floor(system.model, sequences, dtype=self.plan.dtype)
            except failures() as error:  # no gate: systems are timed all the same
                self.no_floor = ": ".join(outcome_of(error))
        del system
        self._forget()

    def _run_group(self, group: Sequence[Setting]) -> None:
        systems: dict[str, System] = {}
        for setting in group:
            _say(f"building {setting.name}")
            refused = self._admit(setting, systems)
            if refused is not None:
                self.results.append(setting.to_dict() | {"status": refused[0], "reason": refused[1]})
            self._forget()
        _say(f"timing {', '.join(systems)}")
        plan = self.plan
        laps: dict[str, Laps] = {}
        try:
            race(systems, self.workload, laps, warmup=plan.warmup, steps=plan.steps, rounds=plan.rounds)
        finally:  # an interrupt keeps the samples that there are
            self.results += [self._result(system, laps.get(name, Laps())) for name, system in systems.items()]
            done = (result for result in self.results if result["name"] in systems)
            self.judge.gates += (_whole(result) for result in done if result.get("recompiles") is not None)
        if plan.kernels:
            self._profile(systems)
        systems.clear()
        self._forget()

    def _admit(self, setting: Setting, systems: dict[str, System]) -> tuple[str, str] | None:
        """Builds a system and puts it among ``systems`` if its gates hold; else ``(status, reason)``."""
        distrust = self.judge.distrusts(setting.targets)
        if distrust is not None:
            return distrust
        try:
            system = self._build(setting)
            first_step(system, self.workload)
        except failures() as error:
            return outcome_of(error)
        refused = self.judge.refuses(system)
        if refused is None:
            systems[setting.name] = system
        return refused

    def _result(self, system: System, laps: Laps) -> dict[str, Any]:
        plain = system.setting.to_dict() | {
            "leak_free": system.setting.system != "stock as shipped",
            "checkpointing_taken": system.choice.setting if system.choice else system.setting.checkpointing,
            "first_step_seconds": system.first_step_seconds,
            "trainable_parameters": sum(p.numel() for _, p in adapters(system.model)),
        }
        if laps.failure is not None:
            return plain | {"status": laps.failure[0], "reason": laps.failure[1]}
        if not laps.samples_ms:
            return plain | {"status": "interrupted", "reason": "before its first timed step"}
        return plain | {"status": "ok", "reason": None} | self._figures(system, laps) | self._compiler(system)

    def _figures(self, system: System, laps: Laps) -> dict[str, Any]:
        cuda, static = self.plan.device.type == "cuda", system.static_bytes()
        seconds = laps.timing.median_ms / 1e3
        flops = StepFlops.of(system.model)(self.workload.batch(0).counts)
        peak = peak_flops(self.plan.device, self.plan.dtype)
        same = self.floor is not None and system.setting.targets == self._floor_targets
        return {
            **laps.timing.to_dict(),
            "tokens_per_second": self.workload.tokens / seconds,
            "static_bytes": static,
            "peak_bytes": static + laps.peak_bytes if cuda else None,
            "model_flops": flops,
            "mfu": flops / seconds / peak if peak else None,
            "of_floor": self.floor.total_ms / laps.timing.median_ms if same and self.floor else None,
        }

    @property
    def _floor_targets(self) -> Targets:
        return self.plan.settings[0].targets

    def _compiler(self, system: System) -> dict[str, Any]:
        if system.prepared is None:
            return {}
        report = system.prepared.report
        compiled = system.prepared.compile_report
        synced = [gate for gate in self.judge.gates if gate.name == SYNC_GATE and gate.subject == system.setting.name]
        return {
            "predicted_bytes": system.choice.predicted_bytes if system.choice else None,
            "kernels": {row.op: row.impl for row in report.kernels},
            "lora_layers": {row.form: row.layers for row in report.lora_rows},
            "compile_seconds": compiled.seconds if compiled else None,
            "graphs": dict(compiled.graphs) if compiled else None,
            "breaks": len(compiled.breaks) if compiled else None,
            "recompiles": len(compiled.recompiles) if compiled else None,
            "reasons": [*compiled.breaks, *compiled.recompiles] if compiled else [],
            "host_syncs": sum(not gate.ok for gate in synced) if self.plan.device.type == "cuda" else None,
        }

    def _child(self, setting: Setting, layers: int, caches: str = "", graphs: Path | None = None) -> dict[str, Any]:
        name = f"{setting.name}, caches {caches}" if caches else setting.name
        _say(f"{name}, in a process of its own, first step within {self.plan.compile_limit_seconds:.0f} s")
        plan = self.plan
        spec = {
            "model": plan.shape.name,
            "layers": layers,
            "lengths": list(plan.lengths),
            "seed": plan.seed,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": str(plan.device),
            "rank": plan.lora.rank,
            "alpha": plan.lora.alpha,
            "adapter_dtype": plan.lora.dtype,
            "backend": "none" if plan.options is None else plan.options.backend,
            "bound": self.judge.gradient_bound(setting.targets) if layers == plan.layers else None,
            "warmup": plan.warmup,
            "steps": plan.steps,
        }
        found = in_child(setting, spec, limit_seconds=plan.compile_limit_seconds, graph_cache=graphs)
        if found["status"] == "ok":
            found["tokens_per_second"] = self.workload.tokens / (found["median_ms"] / 1e3)
        labels = {"name": name, "leak_free": True} | ({"caches": caches} if caches else {})
        return setting.to_dict() | labels | found

    def _profile(self, systems: dict[str, System]) -> None:
        """One step of the fastest of ours for each choice of targets, over the groups so far, or of all of ours."""
        timed = [r for r in self.results if r["system"] == "deltatune" and r["status"] == "ok" and r["name"] in systems]
        of_all = self.plan.kernels == "all"
        for key in dict.fromkeys(result["name" if of_all else "targets"] for result in timed):
            same = (r for r in timed if r["name" if of_all else "targets"] == key)
            best = min(same, key=lambda r: float(r["median_ms"]))
            before = self.kernels.get(key)
            if before is None or best["median_ms"] < before["step_ms"]:
                _say(f"profiling {best['name']}")
                try:
                    self.kernels[key] = self._kernels_of(systems[best["name"]], best)
                    self.kernels_failure.pop(key, None)
                except failures() as error:  # the times stand without it
                    self.kernels_failure[key] = ": ".join(outcome_of(error))
                self._forget()

    def _kernels_of(self, system: System, result: dict[str, Any]) -> dict[str, Any]:
        """The table of a step, beside the floor where it was made for the same targets."""
        batches, targets = self.workload.batches(), result["targets"]
        floor = self.floor.groups if self.floor and targets == self._floor_targets else None
        table = kernel_table(lambda: system.step(next(batches)), self.plan.device, floor=floor)
        return {"name": result["name"], "targets": targets, "step_ms": result["median_ms"], **table}

    def _groups(self) -> Iterable[list[Setting]]:
        """Settings that are timed together: as many as fit of those that hold frozen weights of their own."""
        own = storage_bytes(self.base.parameters())
        room = max(1, int(_WEIGHTS_SHARE * device_memory(self.plan.device) // own) - 1)
        settings = [setting for setting in self.plan.settings if setting.system != COMPILED]
        sharing = [setting for setting in settings if not self._owns(setting)]
        owning = [setting for setting in settings if self._owns(setting)]
        yield [*sharing, *owning[:room]]
        for start in range(room, len(owning), room):
            yield owning[start : start + room]

    def _owns(self, setting: Setting) -> bool:
        """Whether most of the frozen weights are the system's own; those under q, k, v and o are a small part."""
        return setting.lora != "stock" and setting.targets == "all"

    def _build(self, setting: Setting) -> System:
        options = self.plan.options if setting.system == "deltatune" else None
        return build_system(setting, self.base, self.plan.lora, options=options, seed=self.plan.seed)

    def _forget(self) -> None:
        synchronize(self.plan.device)
        gc.collect()
        if self.plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _whole(result: Mapping[str, Any]) -> Gate:
    """Whether the graphs are still the first ones, unbroken, after all timed steps."""
    reasons = result["reasons"]
    return Gate(WHOLE_GATE, result["name"], not reasons, None, None, "; ".join(map(str, reasons))[:500])


_STARTED = time.monotonic()


def _say(what: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f} s] {what}\n")
    sys.stderr.flush()
