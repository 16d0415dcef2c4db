"""What the independence probe found, as a table with a verdict and as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from deltatune.report import table

__all__ = ["VerifyCheck", "VerifyReport", "VerifyRow"]


@dataclass(frozen=True)
class VerifyRow:
    """One type of decoder layer, or the whole model.

    Attributes:
        name: the type of layer (``"linear_attention"``, ``"full_attention, experts"``), or ``"model"``.
        layers: how many layers of the model are of this type; the first of them was probed.
        forward: max over documents of ``||packed - alone|| / ||alone||`` of the output (of logits and loss for the
            whole model).
        input_grad: the same of the gradient with respect to the input.
        parameter_grads: max over parameters of ``||packed - sum of alone|| / ||sum of alone||``.
        cross_document_gradient: largest absolute gradient of some documents' outputs with respect to any other
            document's inputs.
        perturbation: largest absolute change in a document's outputs and input gradients when other documents hold
            other values.
        limits: of the first three columns: the tolerance, or more where the model's own rounding is: documents alone
            are then run once more with every operand of every operation changed by about its last place.
        reach: tokens from a document's start up to which its outputs differ from the document alone; 0 where none do.
        worst_parameter: the parameter behind ``parameter_grads``.
        ok: every column is within its limit.
    """

    name: str
    layers: int
    forward: float
    input_grad: float
    parameter_grads: float
    cross_document_gradient: float
    perturbation: float
    limits: tuple[float, ...]
    reach: int
    worst_parameter: str
    ok: bool

    @property
    def figures(self) -> tuple[float, ...]:
        """The five columns."""
        return (self.forward, self.input_grad, self.parameter_grads, self.cross_document_gradient, self.perturbation)

    @property
    def leaks(self) -> bool:
        """Whether documents depend on each other by more than rounding."""
        return self.cross_document_gradient > 0 or self.forward > self.limits[0]

    @property
    def verdict(self) -> str:
        """``ok``, or what is wrong with this row in words."""
        if self.ok:
            return "ok"
        if any(map(math.isnan, self.figures)):
            return "some outputs or gradients are not finite"
        found = []
        if self.forward > self.limits[0]:
            found.append(f"outputs differ from the document alone up to {self.reach} tokens past its start")
        if self.cross_document_gradient > 0:
            found.append("gradients reach other documents")
        if not found and self.input_grad > self.limits[1]:
            found.append("input gradients differ from the document alone")
        if not found and self.parameter_grads > self.limits[2]:
            found.append(f"gradients of {self.worst_parameter} are not the sum over the documents alone")
        if not found:
            found.append("rounding depends on what other documents hold")
        return " and ".join(found)

    @property
    def limits_line(self) -> str:
        """The row's own limits in words."""
        limits = ", ".join(map(_figure, self.limits))
        return f"{self.name}: its own rounding is beyond the tolerance, measured on documents alone; limits {limits}"


_COMPARED = ("outputs", "input gradients", "parameter gradients")


@dataclass(frozen=True)
class VerifyCheck:
    """A comparison with the stock class's own forward on the same weights.

    Attributes:
        name: what was run.
        figures: relative differences of outputs, and of gradients of inputs and parameters where backward ran.
        limits: of each of them: the tolerance, or more where the model's own rounding was measured to be.
    """

    name: str
    figures: tuple[float, ...]
    limits: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """Whether every figure is finite and within its limit."""
        return all(figure <= limit for figure, limit in zip(self.figures, self.limits, strict=True))

    @property
    def text(self) -> str:
        """The figures in words."""
        pairs = zip(_COMPARED, self.figures, self.limits, strict=False)
        return ", ".join(f"{name} {_figure(figure)} (limit {_figure(limit)})" for name, figure, limit in pairs)


@dataclass(frozen=True)
class VerifyReport:
    """The independence probe's findings; print it, or save ``to_dict()`` with a run.

    Attributes:
        rows: one for each type of decoder layer, then one for the whole model.
        tolerance: limit of the three relative columns; see ``VerifyRow.limits``.
        exact: the perturbation must change nothing bit for bit (on the CPU, and with deterministic algorithms);
            otherwise it is held to ``tolerance`` times the largest value, since atomic adds round differently from run
            to run. The gradient across documents must be exactly zero everywhere.
        lengths: tokens of each document.
        padding: tokens after them.
        dtype: what the model computes in.
        device: where.
        prepared: whether the model was prepared; a stock one is fed what stock collators emit.
        compiled: whether the compiled graphs ran, rather than the same layers eagerly.
        notes: how the model was probed, and what was not run.
        checks: comparisons of a prepared model with the stock class's own forward, and of documents longer than the
            lengths that the config names.
    """

    rows: tuple[VerifyRow, ...]
    tolerance: float
    exact: bool
    lengths: tuple[int, ...]
    padding: int
    dtype: str
    device: str
    prepared: bool
    compiled: bool
    notes: tuple[str, ...]
    checks: tuple[VerifyCheck, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row and every check holds."""
        return all(row.ok for row in self.rows) and all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line: what holds, or where and how documents depend on each other."""
        if self.ok:
            return "OK: every document is as independent as if it were alone"
        wrong = [row for row in self.rows if not row.ok]
        if not wrong:
            findings = "; ".join(f"{check.name}: {check.text}" for check in self.checks if not check.ok)
            if not self.prepared:
                return f"LEAK: {findings} from the document alone; prepare(model) keeps documents apart"
            return f"FAILED: what is computed differs from the stock model on documents alone: {findings}"
        # the whole model inherits what its layers do
        blamed = [row for row in wrong if row.name != "model"] or wrong
        findings = "; ".join(f"{row.name}: {row.verdict}" for row in blamed)
        leak = any(row.leaks for row in wrong)
        remedy = "" if self.prepared else "; prepare(model) keeps documents apart"
        return f"{'LEAK' if leak else 'FAILED'}: {findings}{remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data of the same facts."""
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self), "checks": checks}

    def __str__(self) -> str:
        header = ("probed", "layers", "forward", "input grad", "parameter grads", "cross-document grad", "perturbation")
        rows = [(row.name, row.layers, *map(_figure, row.figures), "ok" if row.ok else "FAILED") for row in self.rows]
        kind = ("prepared" if self.prepared else "stock") + (", compiled" if self.compiled else "")
        limit = "0" if self.exact else f"{self.tolerance:g} of the largest value"
        return "\n".join(
            [
                f"{kind} model, {self.dtype} on {self.device}, packed against alone: documents of "
                f"{_lengths(self.lengths)} tokens, {self.padding} of padding",
                "",
                *table((*header, "verdict"), rows),
                "",
                f"limits: {self.tolerance:g} relative; cross-document gradient 0; perturbation {limit}",
                *(row.limits_line for row in self.rows if max(row.limits) > self.tolerance),
                *(f"{check.name}: {check.text}: {'ok' if check.ok else 'FAILED'}" for check in self.checks),
                *self.notes,
                self.verdict,
            ]
        )


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _lengths(lengths: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, lengths[:12]))
    return shown if len(lengths) <= 12 else f"{shown}, ... ({len(lengths)} documents)"
