"""What prepare did, as a table and as plain data."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, Final

from torch import nn

from deltatune import ops
from deltatune.compile.graphs import CompileReport, graphs_of
from deltatune.hf import model as hf_model
from deltatune.hf.experts import experts_layout, experts_per_token, other_experts
from deltatune.hf.patches import Patch, patches
from deltatune.layers.lora import lora_modes
from deltatune.lora.parameters import is_parameter_lora
from deltatune.models.family import SUPPORTED, Family
from deltatune.options import CompileOptions
from deltatune.quantization.products import op_specs
from deltatune.state import Precision, State
from deltatune.subclass import Swapped

__all__ = ["PrepareReport", "SwapRow", "kernel_rows", "report_of", "table"]

_NARROWEST: Final = 16  # of a column that is wrapped


@dataclass(frozen=True)
class SwapRow:
    """A stock class, the layer its instances became, how many the config implies and how many there were."""

    stock: str
    layer: str
    expected: int | None
    found: int


@dataclass(frozen=True)
class KernelRow:
    """An op, the implementation that runs on the model's device, and why."""

    op: str
    impl: str
    reason: str


@dataclass(frozen=True)
class TrainableRow:
    """Trainable parameters of one name pattern (layer numbers are ``*``): tensors and elements."""

    pattern: str
    tensors: int
    elements: int


@dataclass(frozen=True)
class LoraRow:
    """Layers with adapters that run in one mode (``fused``, ``unfused`` or ``stock``) for one reason."""

    mode: str
    reason: str
    layers: int


@dataclass(frozen=True)
class PrepareReport:
    """Everything ``prepare`` did to a model; print it, or save ``to_dict()`` with a run."""

    family: str
    features: dict[str, str]
    swaps: list[SwapRow]
    kernels: list[KernelRow]
    trainable: list[TrainableRow]
    total_parameters: int
    experts: str | None
    checkpointing: str | float
    checkpointing_reason: str | None
    compile: CompileOptions | None
    compile_report: CompileReport | None
    lora: str | None
    lora_rows: list[LoraRow]
    head: str
    patches: list[Patch]

    @property
    def trainable_parameters(self) -> int:
        """Elements that an optimizer will update."""
        return sum(row.elements for row in self.trainable)

    def to_dict(self) -> dict[str, Any]:
        """Plain data of the same facts."""
        compiled = None
        if self.compile is not None and self.compile_report is not None:
            given = self.compile
            options = {"scope": given.scope, "strict": given.strict, "options": dict(given.options)}
            compiled = options | self.compile_report.to_dict()
        facts = asdict(replace(self, compile=None, compile_report=None))
        del facts["compile_report"]
        facts["lora_layers"] = facts.pop("lora_rows")
        return {**facts, "trainable_parameters": self.trainable_parameters, "compile": compiled}

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """The report for people, its tables no wider than so many columns."""
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines = [f"family {self.family}"]
        lines += [f"  {name}: {text}" for name, text in self.features.items()]
        lines += ["", *table(("stock class", "becomes", "expected", "found"), map(astuple, self.swaps), width)]
        lines += ["", *table(("op", "runs on", "because"), map(astuple, self.kernels), width)]
        lines += ["", f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%)"]
        lines += self._trainable_table(width) if self.trainable else []
        lines += [] if self.experts is None else ["", f"experts: {self.experts}"]
        if self.lora is not None:
            lines += ["", f"lora: {self.lora}"]
            lines += table(("runs", "because", "layers"), map(astuple, self.lora_rows), width)
        if self.head == "transformed":
            lines.append("head: logits are scaled or capped after it, so the loss builds them whole")
        if self.patches:
            header = ("other tools' work on", "by", "modules", "becomes")
            lines += ["", *table(header, map(astuple, self.patches), width)]
        reason = "" if self.checkpointing_reason is None else f": {self.checkpointing_reason}"
        lines += ["", f"checkpointing {self.checkpointing}{reason}", self._compile_line()]
        return "\n".join(lines)

    def _trainable_table(self, width: int | None) -> list[str]:
        """Names in full; where they are too long for the width, what all begin with stands in the header alone."""
        rows = [(r.pattern, r.tensors, f"{r.elements:,}") for r in self.trainable]
        lines = table(("trainable", "tensors", "elements"), rows)
        shared = _shared_path([row.pattern for row in self.trainable])
        if width is None or max(map(len, lines)) <= width or not shared:
            return lines if width is None else table(("trainable", "tensors", "elements"), rows, width)
        short = [(name.removeprefix(shared), *counts) for name, *counts in rows]
        return [f"in {shared}", *table(("trainable", "tensors", "elements"), short, width)]

    def _compile_line(self) -> str:
        if self.compile is None or self.compile_report is None:
            return "compile: off"
        report = self.compile_report
        graphs = ", ".join(f"{name} {count}" for name, count in report.graphs.items()) or "none yet"
        return (
            f"compile: scope {self.compile.scope}, graphs {graphs}, breaks {len(report.breaks)}, "
            f"recompiles {len(report.recompiles)}, {report.seconds:.1f} s"
        )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> list[str]:
    """Lines of a plain-text table with aligned columns; ``-`` for None.

    Where they would be wider than ``width``, the widest column is wrapped, after spaces and dots.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if width is not None and (excess := sum(widths) + 2 * (len(widths) - 1) - width) > 0:
        widest = widths.index(max(widths))
        widths[widest] = max(widths[widest] - excess, _NARROWEST)
        cells = [line for row in cells for line in _wrapped(row, widest, widths[widest])]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * size for size in widths), *lines[1:]]


def _shared_path(names: Sequence[str]) -> str:
    """What dotted names begin with, whole parts of them."""
    first, last = min(names).split("."), max(names).split(".")
    parts = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{part}." for part, _ in parts)


def _wrapped(row: Sequence[str], column: int, width: int) -> list[list[str]]:
    """A row as several, one cell wrapped over them."""
    pieces = [""]
    for part in re.findall(r"[^ .]*[ .]?", row[column]):
        if pieces[-1] and len(pieces[-1]) + len(part.rstrip()) > width:
            pieces.append("")
        pieces[-1] += part
    lines = [list(row), *([""] * len(row) for _ in pieces[1:])]
    for line, piece in zip(lines, pieces, strict=True):
        line[column] = piece
    return lines


def report_of(model: nn.Module, family: Family, state: State, swaps: list[SwapRow]) -> PrepareReport:
    """What runs now: trainable parameters and compile counts are read when this is called."""
    options, adapters = state.options, getattr(model, "peft_config", None)
    text_model = hf_model.text_model(model)
    layers = ((type(module), module) for module in model.modules() if isinstance(module, Swapped))
    modes = lora_modes(model, text_model, options.lora, hf_model.device_of(model), state.facts)
    counts = Counter((mode.name, mode.reason) for _, mode in modes)
    return PrepareReport(
        family=family.name,
        features={"packing": SUPPORTED, "compile": SUPPORTED, **family.features},
        swaps=swaps,
        kernels=kernel_rows(layers, options.kernels, model, state.facts.precision),
        trainable=_trainable_rows(model),
        total_parameters=sum(p.numel() for p in model.parameters()),
        experts=_experts(model, text_model),
        checkpointing=state.checkpointing,
        checkpointing_reason=_auto_reason(state),
        compile=options.compile,
        compile_report=None if options.compile is None else graphs_of(state).report,
        lora=f"adapter {', '.join(adapters)}" if adapters else None,
        lora_rows=[LoraRow(mode, reason, count) for (mode, reason), count in counts.items()],
        head=state.facts.head,
        patches=patches(hf_model.base_model(model), text_model),
    )


def kernel_rows(
    layers: Iterable[tuple[type[Swapped], nn.Module]],
    requests: Mapping[str, str],
    model: nn.Module,
    precision: Precision | None = None,
) -> list[KernelRow]:
    """What the layers in front of these modules and weights in few bits take, chosen as they do, by the same specs."""
    device = hf_model.device_of(model)
    dtype = hf_model.compute_dtype(model) if precision is None else precision.dtype
    of_layers = (spec for layer, module in layers for spec in layer.op_specs(module, device, dtype))
    specs = dict.fromkeys([*of_layers, *op_specs(model, device, dtype)])
    choices = [(spec.op, ops.choose(spec, requests[spec.op])) for spec in specs]
    rows = dict.fromkeys(KernelRow(op, choice.impl, choice.reason) for op, choice in choices)
    return sorted(rows, key=lambda row: list(requests).index(row.op))


def _trainable_rows(model: nn.Module) -> list[TrainableRow]:
    """Trainable parameters by the kind of module that owns them, layer numbers left out."""
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            sizes.setdefault(kind, []).append(parameter.numel())
    return [TrainableRow(kind, len(elements), sum(elements)) for kind, elements in sizes.items()]


def _experts(model: nn.Module, text_model: Any) -> str | None:
    """The routed experts with fused weights: how many, which share of the model, and what of them trains."""
    layouts = {module: experts_layout(module) for module in text_model.modules()}
    found = [(module, layout) for module, layout in layouts.items() if layout is not None]
    others = ", ".join(f"{count} {name}" for name, count in other_experts(text_model).items())
    kept = f"{others} of another layout: their own forward runs, adapters on them are PEFT's" if others else None
    if not found:
        return kept
    own = [parameter for module, _ in found for parameter in module.parameters(recurse=False)]
    wrappers = [module for module in text_model.modules() if is_parameter_lora(module)]
    adapted = {wrapper.get_base_layer() for wrapper in wrappers}
    factors = [p for wrapper in wrappers if wrapper.get_base_layer() in layouts for p in _factors(wrapper)]
    sizes = {module.down_proj.shape[0] for module, _ in found}
    per_token = {experts_per_token(module.config, module.down_proj.shape[0]) for module, _ in found}
    elements, total = sum(p.numel() for p in own), sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in (*own, *factors) if p.requires_grad)
    line = (
        f"{' or '.join(map(str, sorted(sizes)))} a layer in {len(found)} {'layer' if len(found) == 1 else 'layers'}, "
        f"{' or '.join(map(str, sorted(per_token)))} a token; {elements:,} parameters "
        f"({100 * elements / max(total, 1):.1f}%), {trained:,} trained for them"
    )
    line += "" if kept is None else f"; {kept}"
    if getattr(model, "peft_config", None) and not any(module in adapted for module, _ in found):
        line += "; no adapter on them (target_parameters of PEFT; in a recipe lora.target_parameters: all-experts)"
    return line


def _factors(wrapper: Any) -> list[nn.Parameter]:
    return [*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters()]


def _auto_reason(state: State) -> str | None:
    if state.facts.auto is None:
        return None
    choice = state.facts.auto.choice
    return "auto, decided at the first training forward" if choice is None else f"auto takes it, {choice.reason}"
