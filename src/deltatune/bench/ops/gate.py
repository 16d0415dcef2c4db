"""Correctness before time: the error of a variant against the reference in float64, and the error it may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.bench.ops.case import Case, Function, Tensors

__all__ = ["Gate", "gradient_weights", "leaves", "results"]

ALLOWED = 2.0
"""How many times the error of the reference a variant may have."""


@dataclass(frozen=True)
class Gate:
    """Exact results of a case, and the relative L2 error that is allowed to be doubled, by name of the tensor."""

    exact: Tensors
    budget: dict[str, float]

    @classmethod
    def of(cls, case: Case, inputs: Tensors, *, packed: bool = True) -> Gate:
        """Runs the reference in float64 and in the dtype of the inputs.

        Args:
            case: the op.
            inputs: one draw of it.
            packed: False for the reference without documents.
        """
        reference = case.reference if packed else case.unpacked
        assert reference is not None, "a variant without documents needs Case.unpacked"
        wanted = (*case.trained, *case.checked)
        double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        exact = results(reference, double, case.outputs, wanted)
        del double
        if case.budget is not None:
            return cls(exact, case.budget(inputs, exact))
        return cls(exact, errors(results(reference, inputs, case.outputs, wanted), exact))

    def check(self, case: Case, function: Function, inputs: Tensors) -> tuple[dict[str, float], str | None]:
        """The errors of a function, and what is wrong with them: None where each is within twice the budget."""
        found = errors(results(function, inputs, case.outputs, (*case.trained, *case.checked)), self.exact)
        # NaN compares as False, so that it is over
        over = [name for name, error in found.items() if not error <= ALLOWED * self.budget[name]]
        if not over:
            return found, None
        parts = (f"{name} {found[name]:.1e}, allowed {ALLOWED * self.budget[name]:.1e}" for name in over)
        return found, f"relative error of {'; '.join(parts)}"


def results(function: Function, inputs: Tensors, outputs: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The outputs by name, and the gradients of a weighted sum of them as ``d<input>``."""
    given = leaves(inputs, wanted)
    out = function(given)
    found = (out,) if isinstance(out, Tensor) else out
    grads = torch.autograd.grad(found, [given[name] for name in wanted], gradient_weights(found))
    named = zip(wanted, grads, strict=True)
    return dict(zip(outputs, (x.detach() for x in found), strict=True)) | {f"d{name}": grad for name, grad in named}


def leaves(inputs: Tensors, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The inputs on storage of their own graph, strides kept, gradients wanted of those named."""
    return {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}


def gradient_weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Fixed gradients of the outputs: the same numbers whatever the dtype; 1 for a scalar."""
    return [torch.ones_like(x) if x.ndim == 0 else _weights(x, seed) for seed, x in enumerate(outputs, start=1)]


def _weights(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)


def errors(found: Mapping[str, Tensor], exact: Tensors) -> dict[str, float]:
    """``|found - exact| / |exact|`` in the L2 norm, by name; infinite where something is not a number."""
    return {name: _error(found[name], exact[name]) for name in exact}


def _error(found: Tensor, exact: Tensor) -> float:
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf
