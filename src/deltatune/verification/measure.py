"""The measurement itself: packed against alone, gradients across documents, and perturbation."""

# T tokens of the pack, E features; documents are slices of T, the padding one of them

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor, nn

from deltatune.verification.report import VerifyRow
from deltatune.verification.rounding import limits_of

__all__ = ["Pack", "Pass", "Run", "Subject", "differences", "measure", "relative", "run_once", "worst_of"]

#: Of a parameter's gradient, an entry in the mean, against the parameter with the largest.
_LEAST_GRADIENT: Final = 1e-5

#: ``(inputs [1, T, E], trained [T]) -> (output [1, T, ...], scalar objective of the tokens in trained)``
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pack:
    """Lengths of the packed documents, and of the padding after them."""

    lengths: tuple[int, ...]
    padding: int

    @functools.cached_property
    def slices(self) -> list[slice]:
        """Where each document lies in the pack; the padding last."""
        lengths = (*self.lengths, self.padding) if self.padding else self.lengths
        return [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]

    @property
    def places(self) -> list[slice]:
        """Where each document lies in the pack, without the padding."""
        return self.slices[: len(self.lengths)]

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
        name, layers: as in the report.
        inputs, others: ``[1, T, E]``, and other values of that shape for the perturbation.
        parameters: what is differentiated in addition to the input.
        packed: runs the pack.
        alone: what runs each document alone.
        has_loss: the objective is a loss, compared as an output is.
    """

    name: str
    layers: int
    inputs: Tensor
    others: Tensor
    parameters: Mapping[str, nn.Parameter]
    packed: Run
    alone: Sequence[Run]
    has_loss: bool = False


@dataclass(frozen=True)
class Pass:
    """What forward and backward gave; of documents alone end to end, with sums for the objective and the parameters."""

    output: Tensor
    objective: Tensor
    input_grad: Tensor
    parameter_grads: tuple[Tensor | None, ...]


def measure(subject: Subject, documents: Pack, *, tolerance: float, exact: bool) -> VerifyRow:
    """All columns of one row; see ``VerifyRow`` and ``VerifyReport.exact``."""
    places = documents.places
    trained = (torch.arange(documents.total) < sum(documents.lengths)).to(subject.inputs.device)
    run_alone = functools.partial(_alone, subject, places)
    differ = functools.partial(differences, subject, places)
    alone = run_alone()
    packed = run_once(subject.packed, subject.inputs, tuple(subject.parameters.values()), trained)
    figures = differ(packed, alone)
    crossing, changed, largest = _disturb(subject, documents, packed, trained)
    limits = (tolerance,) * 3 if crossing else limits_of(figures, tolerance, run_alone, differ, alone)
    # comparisons with NaN are False, so that figures that are not finite fail
    within = all(figure <= limit for figure, limit in zip(figures, limits, strict=True))
    errors = _parameter_errors(subject, packed, alone)
    return VerifyRow(
        name=subject.name,
        layers=subject.layers,
        forward=figures[0],
        input_grad=figures[1],
        parameter_grads=figures[2],
        cross_document_gradient=crossing,
        perturbation=changed,
        limits=limits,
        reach=max(_reach(packed.output[:, place], alone.output[:, place], limits[0]) for place in places),
        worst_parameter=max(errors, key=errors.__getitem__, default=""),
        ok=within and crossing == 0 and changed <= (0.0 if exact else tolerance * largest),
    )


def _alone(subject: Subject, places: Sequence[slice]) -> Pass:
    parameters = tuple(subject.parameters.values())
    summed: tuple[Tensor | None, ...] = (None,) * len(parameters)
    outputs, objectives, input_grads = [], [], []
    for run, place in zip(subject.alone, places, strict=True):
        one = run_once(run, subject.inputs[:, place], parameters)
        summed = tuple(map(_add, summed, one.parameter_grads))
        outputs.append(one.output)
        objectives.append(one.objective)
        input_grads.append(one.input_grad)
    return Pass(torch.cat(outputs, dim=1), torch.stack(objectives).sum(), torch.cat(input_grads, dim=1), summed)


def run_once(run: Run, inputs: Tensor, parameters: tuple[nn.Parameter, ...], trained: Tensor | None = None) -> Pass:
    """Forward and backward, of all tokens unless ``trained`` says otherwise; ``.grad`` stays untouched."""
    leaf = inputs.detach().clone().requires_grad_()
    if trained is None:
        trained = torch.ones(inputs.shape[1], dtype=torch.bool, device=inputs.device)
    output, objective = run(leaf, trained)
    grads = torch.autograd.grad(objective, [leaf, *parameters], allow_unused=True)
    input_grad = torch.zeros_like(leaf) if grads[0] is None else grads[0]
    return Pass(output.detach(), objective.detach(), input_grad, grads[1:])


def differences(subject: Subject, places: Sequence[slice], found: Pass, expected: Pass) -> tuple[float, ...]:
    """``(forward, input grad, parameter grads)``, the largest of all documents, which lie at ``places``."""
    forward = [relative(found.output[:, place], expected.output[:, place]) for place in places]
    if subject.has_loss:
        forward.append(relative(found.objective, expected.objective))
    input_grad = [relative(found.input_grad[:, place], expected.input_grad[:, place]) for place in places]
    parameter_grads = _parameter_errors(subject, found, expected).values()
    return worst_of(forward), worst_of(input_grad), worst_of(parameter_grads)


def _parameter_errors(subject: Subject, found: Pass, expected: Pass) -> dict[str, float]:
    """Of gradients that are rounding alone, as of a key's bias before a softmax, against the least of the others."""
    grads = [grad for grad in expected.parameter_grads if grad is not None and grad.numel()]
    least = max([float(grad.norm()) * grad.numel() ** -0.5 for grad in grads], default=0.0) * _LEAST_GRADIENT
    pairs = zip(found.parameter_grads, expected.parameter_grads, strict=True)
    return {name: relative(*pair, least) for name, pair in zip(subject.parameters, pairs, strict=True)}


def _disturb(subject: Subject, documents: Pack, packed: Pass, trained: Tensor) -> tuple[float, float, float]:
    """``(gradient across documents, change under perturbation, largest value compared)``.

    For each group of documents, all others get other inputs and no objective. The group must not notice the inputs,
    and the others must get no gradient.
    """
    crossing, changed = [], []
    for group in documents.groups():
        group = group.to(trained.device)
        inputs = torch.where(group[:, None], subject.inputs, subject.others)
        one = run_once(subject.packed, inputs, (), group & trained)
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


def relative(found: Tensor | None, expected: Tensor | None, least: float = 0.0) -> float:
    """``||found - expected|| / ||expected||``, 0 where they are equal and 1 where only ``expected`` is zero.

    Entries of ``expected`` count as ``least`` at least, in the mean.
    """
    if found is None or expected is None:
        given = expected if found is None else found
        return 0.0 if given is None or not bool(given.any()) else 1.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = float((found.to(wide) - expected.to(wide)).norm())
    if difference == 0:
        return 0.0
    size = max(float(expected.to(wide).norm()), least * expected.numel() ** 0.5)
    return difference / size if size else 1.0


def _reach(found: Tensor, expected: Tensor, tolerance: float) -> int:
    """Tokens from the document's start to the last one that differs by more than the tolerance."""
    error = (found.float() - expected.float()).flatten(2).norm(dim=-1)[0]
    limit = tolerance * expected.float().flatten(2).norm(dim=-1)[0].mean()
    wrong = (error > limit).nonzero()
    return int(wrong[-1]) + 1 if wrong.numel() else 0


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def worst_of(figures: Iterable[float]) -> float:
    """The maximum, NaN where any is; 0 of none."""
    return float(torch.tensor([0.0, *figures], dtype=torch.float64).max())
