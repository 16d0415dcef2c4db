"""The measurement itself: packed against alone, gradients across documents, and perturbation."""

# T tokens of the pack, E features; documents are slices of T, the padding one of them

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from deltatune.verification.report import VerifyRow

__all__ = ["Documents", "Run", "Subject", "measure"]

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
        parameters: what is differentiated beside the input.
        packed: runs the pack.
        alone: runs one document, by its number.
    """

    name: str
    layers: int
    inputs: Tensor
    others: Tensor
    parameters: Mapping[str, nn.Parameter]
    packed: Run
    alone: Callable[[int], Run]


@dataclass(frozen=True)
class _Pass:
    """What one forward and backward gave."""

    output: Tensor
    objective: Tensor
    input_grad: Tensor
    parameter_grads: tuple[Tensor | None, ...]


def measure(subject: Subject, documents: Documents, *, tolerance: float, exact: bool) -> VerifyRow:
    """All columns of one row; see ``VerifyRow`` and ``VerifyReport.exact``."""
    parameters = tuple(subject.parameters.values())
    trained = torch.arange(documents.total) < sum(documents.lengths)
    trained = trained.to(subject.inputs.device)
    alone = []
    summed: list[Tensor | None] = [None] * len(parameters)
    for index, place in enumerate(documents.slices[: len(documents.lengths)]):
        one = _run(subject.alone(index), subject.inputs[:, place], trained[place], parameters)
        summed = [_add(total, grad) for total, grad in zip(summed, one.parameter_grads, strict=True)]
        alone.append(_Pass(one.output, one.objective, one.input_grad, ()))
    packed = _run(subject.packed, subject.inputs, trained, parameters)
    worst_parameter, parameter_grads = _worst_parameter(tuple(subject.parameters), packed.parameter_grads, summed)
    pairs = list(zip(alone, documents.slices, strict=False))
    forward = [_relative(packed.output[:, place], one.output) for one, place in pairs]
    forward.append(_relative(packed.objective, torch.stack([one.objective for one in alone]).sum()))
    input_grad = [_relative(packed.input_grad[:, place], one.input_grad) for one, place in pairs]
    crossing, changed, largest = _disturb(subject, documents, packed, trained)
    figures = {"forward": _worst(forward), "input_grad": _worst(input_grad), "parameter_grads": parameter_grads}
    limit = 0.0 if exact else tolerance * largest
    # comparisons with NaN are False, so that figures that are not finite fail
    return VerifyRow(
        name=subject.name,
        layers=subject.layers,
        **figures,
        cross_document_gradient=crossing,
        perturbation=changed,
        reach=max(_reach(packed.output[:, place], one.output, tolerance) for one, place in pairs),
        worst_parameter=worst_parameter,
        ok=all(figure <= tolerance for figure in figures.values()) and crossing == 0 and changed <= limit,
    )


def _run(run: Run, inputs: Tensor, trained: Tensor, parameters: tuple[nn.Parameter, ...]) -> _Pass:
    """Forward and backward; ``.grad`` stays untouched."""
    leaf = inputs.detach().clone().requires_grad_()
    output, objective = run(leaf, trained)
    grads = torch.autograd.grad(objective, [leaf, *parameters], allow_unused=True)
    input_grad = torch.zeros_like(leaf) if grads[0] is None else grads[0]
    return _Pass(output.detach(), objective.detach(), input_grad, grads[1:])


def _disturb(subject: Subject, documents: Documents, packed: _Pass, trained: Tensor) -> tuple[float, float, float]:
    """``(gradient across documents, change under perturbation, largest value compared)``.

    For each group of documents, all others get other inputs and no objective. The group must not notice the inputs,
    and the others must get no gradient.
    """
    crossing, changed = [], []
    for group in documents.groups():
        group = group.to(trained.device)
        inputs = torch.where(group[:, None], subject.inputs, subject.others)
        one = _run(subject.packed, inputs, group & trained, ())
        crossing.append(_largest(one.input_grad[:, ~group]))
        changed.append(_largest(one.output[:, group] - packed.output[:, group]))
        changed.append(_largest(one.input_grad[:, group] - packed.input_grad[:, group]))
    return _worst(crossing), _worst(changed), max(_largest(packed.output), _largest(packed.input_grad))


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Sums of 16-bit gradients are kept in float32."""
    if grad is None:
        return total
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(wide, copy=True) if total is None else total.add_(grad)


def _worst_parameter(
    names: tuple[str, ...], packed: tuple[Tensor | None, ...], summed: list[Tensor | None]
) -> tuple[str, float]:
    worst, figure = "", 0.0
    for name, ours, theirs in zip(names, packed, summed, strict=True):
        if ours is None and theirs is None:
            continue
        error = _relative(
            torch.zeros_like(theirs) if ours is None and theirs is not None else ours,
            torch.zeros_like(ours) if theirs is None and ours is not None else theirs,
        )
        if not error <= figure:
            worst, figure = name, error
    return worst, figure


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    """``||found - expected|| / ||expected||``, 0 where they are equal and 1 where only ``expected`` is zero."""
    assert found is not None
    assert expected is not None
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


def _worst(figures: list[float]) -> float:
    """The maximum, NaN where any is."""
    return float(torch.tensor(figures, dtype=torch.float64).max())
