"""The measurement itself: packed against alone, gradients across documents, and perturbation."""

# T tokens of the pack, E features; documents are slices of T, the padding one of them

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from deltatune.verification.report import VerifyRow
from deltatune.verification.rounding import limit_of, nudged

__all__ = ["Documents", "Outcome", "Run", "Subject", "differences", "measure", "relative", "run_once", "worst_of"]

#: ``(inputs [1, T, E], trained [T]) -> (output [1, T, ...], scalar objective of the tokens in trained)``
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Documents:
    """Lengths of the packed documents, and of the padding after them."""

    lengths: tuple[int, ...]
    padding: int

    @cached_property
    def slices(self) -> list[slice]:
        """Where each document lies in the pack; the padding last."""
        bounds, start = [], 0
        for length in (*self.lengths, *([self.padding] if self.padding else [])):
            bounds.append(slice(start, start + length))
            start += length
        return bounds

    @property
    def total(self) -> int:
        """Tokens of the pack."""
        return sum(self.lengths) + self.padding

    def groups(self) -> Iterator[Tensor]:
        """Boolean masks ``[T]`` over whole documents, such that any two documents are parted by one of them.

        The bits of a document's number and their complements: ``2 log2(S)`` groups rather than ``S``.
        """
        number = torch.empty(self.total, dtype=torch.long)
        for index, place in enumerate(self.slices):
            number[place] = index
        for bit in range((len(self.slices) - 1).bit_length()):
            inside = (number >> bit) & 1 == 1
            yield inside
            yield ~inside


@dataclass(frozen=True)
class Subject:
    """Something to probe: a decoder layer, or the whole model.

    Attributes:
        name: as in the report.
        layers: how many of them the model has.
        inputs: ``[1, T, E]``.
        others: other values of the same shape, for the perturbation.
        parameters: what is differentiated in addition to the input.
        packed: runs the pack.
        alone: runs one document, by its number.
        has_loss: the objective is a loss, compared as an output is.
    """

    name: str
    layers: int
    inputs: Tensor
    others: Tensor
    parameters: Mapping[str, nn.Parameter]
    packed: Run
    alone: Callable[[int], Run]
    has_loss: bool = False


@dataclass(frozen=True)
class Pass:
    """What one forward and backward gave."""

    output: Tensor
    objective: Tensor
    input_grad: Tensor
    parameter_grads: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Outcome:
    """What all documents gave: a tensor for each of them, sums over them for the objective and the parameters."""

    outputs: list[Tensor]
    objective: Tensor
    input_grads: list[Tensor]
    parameter_grads: tuple[Tensor | None, ...]


def measure(subject: Subject, documents: Documents, *, tolerance: float, exact: bool) -> VerifyRow:
    """All columns of one row; see ``VerifyRow`` and ``VerifyReport.exact``."""
    trained = (torch.arange(documents.total) < sum(documents.lengths)).to(subject.inputs.device)
    alone = _alone(subject, documents, subject.inputs)
    packed = run_once(subject.packed, subject.inputs, trained, tuple(subject.parameters.values()))
    found = _split(packed, documents)
    figures, worst_parameter = differences(subject, found, alone)
    crossing, changed, largest = _disturb(subject, documents, packed, trained)
    limits = (tolerance,) * 3
    if crossing == 0 and any(figure > tolerance for figure in figures):
        limits = _rounding(subject, documents, alone, tolerance)
    # comparisons with NaN are False, so that figures that are not finite fail
    within = all(figure <= limit for figure, limit in zip(figures, limits, strict=True))
    return VerifyRow(
        name=subject.name,
        layers=subject.layers,
        forward=figures[0],
        input_grad=figures[1],
        parameter_grads=figures[2],
        cross_document_gradient=crossing,
        perturbation=changed,
        limits=limits,
        reach=max(_reach(*pair, limits[0]) for pair in zip(found.outputs, alone.outputs, strict=True)),
        worst_parameter=worst_parameter,
        ok=within and crossing == 0 and changed <= (0.0 if exact else tolerance * largest),
    )


def _alone(subject: Subject, documents: Documents, inputs: Tensor) -> Outcome:
    parameters = tuple(subject.parameters.values())
    summed: tuple[Tensor | None, ...] = (None,) * len(parameters)
    outputs, objectives, input_grads = [], [], []
    for index, place in enumerate(documents.slices[: len(documents.lengths)]):
        trained = torch.ones(documents.lengths[index], dtype=torch.bool, device=inputs.device)
        one = run_once(subject.alone(index), inputs[:, place], trained, parameters)
        summed = tuple(_add(total, grad) for total, grad in zip(summed, one.parameter_grads, strict=True))
        outputs.append(one.output)
        objectives.append(one.objective)
        input_grads.append(one.input_grad)
    return Outcome(outputs, torch.stack(objectives).sum(), input_grads, summed)


def _split(packed: Pass, documents: Documents) -> Outcome:
    places = documents.slices[: len(documents.lengths)]
    return Outcome(
        [packed.output[:, place] for place in places],
        packed.objective,
        [packed.input_grad[:, place] for place in places],
        packed.parameter_grads,
    )


def run_once(run: Run, inputs: Tensor, trained: Tensor, parameters: tuple[nn.Parameter, ...]) -> Pass:
    """Forward and backward; ``.grad`` stays untouched."""
    leaf = inputs.detach().clone().requires_grad_()
    output, objective = run(leaf, trained)
    grads = torch.autograd.grad(objective, [leaf, *parameters], allow_unused=True)
    input_grad = torch.zeros_like(leaf) if grads[0] is None else grads[0]
    return Pass(output.detach(), objective.detach(), input_grad, grads[1:])


def differences(subject: Subject, found: Outcome, expected: Outcome) -> tuple[tuple[float, float, float], str]:
    """``((forward, input grad, parameter grads), the parameter behind the last)``."""
    forward = [relative(*pair) for pair in zip(found.outputs, expected.outputs, strict=True)]
    if subject.has_loss:
        forward.append(relative(found.objective, expected.objective))
    input_grad = [relative(*pair) for pair in zip(found.input_grads, expected.input_grads, strict=True)]
    worst, parameter_grads = "", 0.0
    pairs = zip(subject.parameters, found.parameter_grads, expected.parameter_grads, strict=True)
    for name, ours, theirs in pairs:
        error = relative(ours, theirs)
        if not error <= parameter_grads:
            worst, parameter_grads = name, error
    return (worst_of(forward), worst_of(input_grad), parameter_grads), worst


def _rounding(subject: Subject, documents: Documents, alone: Outcome, tolerance: float) -> tuple[float, float, float]:
    """The limits of a subject whose own rounding, measured on documents alone, is beyond the tolerance.

    Packed and alone sum in another order, which is a change of that kind at every operation.
    """
    with nudged():
        other = _alone(subject, documents, subject.inputs)
    forward, input_grad, parameter_grads = (limit_of(tolerance, f) for f in differences(subject, other, alone)[0])
    return forward, input_grad, parameter_grads


def _disturb(subject: Subject, documents: Documents, packed: Pass, trained: Tensor) -> tuple[float, float, float]:
    """``(gradient across documents, change under perturbation, largest value compared)``.

    For each group of documents, all others get other inputs and no objective. The group must not notice the inputs,
    and the others must get no gradient.
    """
    crossing, changed = [], []
    for group in documents.groups():
        group = group.to(trained.device)
        inputs = torch.where(group[:, None], subject.inputs, subject.others)
        one = run_once(subject.packed, inputs, group & trained, ())
        crossing.append(_largest(one.input_grad[:, ~group]))
        changed.append(_largest(one.output[:, group] - packed.output[:, group]))
        changed.append(_largest(one.input_grad[:, group] - packed.input_grad[:, group]))
    return worst_of(crossing), worst_of(changed), max(_largest(packed.output), _largest(packed.input_grad))


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Sums of 16-bit gradients are kept in float32."""
    if grad is None:
        return total
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(wide, copy=True) if total is None else total.add_(grad)


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """``||found - expected|| / ||expected||``, 0 where they are equal and 1 where only ``expected`` is zero."""
    if found is None or expected is None:
        given = expected if found is None else found
        return 0.0 if given is None or not bool(given.any()) else 1.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = float((found.to(wide) - expected.to(wide)).norm())
    if difference == 0:
        return 0.0
    size = float(expected.to(wide).norm())
    return difference / size if size else 1.0


def _reach(found: Tensor, expected: Tensor, tolerance: float) -> int:
    """Tokens from the document's start to the last one that differs by more than the tolerance."""
    error = (found.float() - expected.float()).flatten(2).norm(dim=-1)[0]
    limit = tolerance * expected.float().flatten(2).norm(dim=-1)[0].mean()
    wrong = (error > limit).nonzero()
    return int(wrong[-1]) + 1 if wrong.numel() else 0


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def worst_of(figures: list[float]) -> float:
    """The maximum, NaN where any is."""
    return float(torch.tensor(figures, dtype=torch.float64).max())
