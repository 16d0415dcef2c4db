"""What prepare did, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltatune.compile.graphs import CompileOptions, CompileReport

__all__ = ["KernelRow", "LoraRow", "PrepareReport", "SwapRow", "TrainableRow", "table"]


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
    checkpointing: str | float
    checkpointing_reason: str | None
    compile: CompileOptions | None
    compile_report: CompileReport | None
    lora: str | None
    lora_rows: list[LoraRow]
    head: str

    @property
    def trainable_parameters(self) -> int:
        """Elements that an optimizer will update."""
        return sum(row.elements for row in self.trainable)

    def to_dict(self) -> dict[str, Any]:
        """Plain data of the same facts."""
        compiled = None
        if self.compile is not None and self.compile_report is not None:
            options = {
                "scope": self.compile.scope,
                "strict": self.compile.strict,
                "options": dict(self.compile.options),
            }
            compiled = options | self.compile_report.to_dict()
        return {
            "family": self.family,
            "features": dict(self.features),
            "swaps": [asdict(row) for row in self.swaps],
            "kernels": [asdict(row) for row in self.kernels],
            "trainable": [asdict(row) for row in self.trainable],
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "checkpointing": self.checkpointing,
            "checkpointing_reason": self.checkpointing_reason,
            "compile": compiled,
            "lora": self.lora,
            "lora_layers": [asdict(row) for row in self.lora_rows],
            "head": self.head,
        }

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines = [f"family {self.family}"]
        lines += [f"  {name}: {text}" for name, text in self.features.items()]
        swaps = [(r.stock, r.layer, "-" if r.expected is None else r.expected, r.found) for r in self.swaps]
        lines += ["", *table(("stock class", "becomes", "expected", "found"), swaps)]
        lines += ["", *table(("op", "runs on", "because"), [(r.op, r.impl, r.reason) for r in self.kernels])]
        lines += ["", f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%)"]
        rows = [(r.pattern, r.tensors, f"{r.elements:,}") for r in self.trainable]
        lines += table(("trainable", "tensors", "elements"), rows) if rows else []
        if self.lora is not None:
            lines += ["", f"lora: {self.lora}"]
            lines += table(("runs", "because", "layers"), [(r.mode, r.reason, r.layers) for r in self.lora_rows])
        if self.head == "transformed":
            lines.append("head: logits are scaled or capped after it, so the loss builds them whole")
        reason = "" if self.checkpointing_reason is None else f": {self.checkpointing_reason}"
        lines += ["", f"checkpointing {self.checkpointing}{reason}", self._compile_line()]
        return "\n".join(lines)

    def _compile_line(self) -> str:
        if self.compile is None or self.compile_report is None:
            return "compile: off"
        report = self.compile_report
        graphs = ", ".join(f"{name} {count}" for name, count in report.graphs.items()) or "none yet"
        return (
            f"compile: scope {self.compile.scope}, graphs {graphs}, breaks {len(report.breaks)}, "
            f"recompiles {len(report.recompiles)}, {report.seconds:.1f} s"
        )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a plain-text table with aligned columns."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
