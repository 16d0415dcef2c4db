"""Which implementation of an op runs, and why: one decision, used by the op itself and by reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Candidate", "Choice", "choose", "traced_reference"]


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason in words."""

    impl: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """An implementation an op knows.

    Attributes:
        impl: its name, as passed to ``impl=``.
        reason: what speaks for it where it runs.
        refusal: why it cannot run here and what to do about that; None where it can.
    """

    impl: str
    reason: str
    refusal: str | None = None


def choose(op: str, impl: str, candidates: Sequence[Candidate]) -> Choice:
    """Takes the first candidate that can run for ``"auto"``, otherwise exactly the one that is named.

    Args:
        op: the op's public name, for messages.
        impl: ``"auto"`` or a candidate's name.
        candidates: in order of preference; the last one runs anywhere.

    Raises:
        ValueError: a name no candidate has, or one that cannot run here (with its remedy).
    """
    if impl == "auto":
        for candidate in candidates:
            if candidate.refusal is None:
                return Choice(candidate.impl, candidate.reason)
        raise ValueError(f"{op}: no implementation can run here: " + "; ".join(str(c.refusal) for c in candidates))
    for candidate in candidates:
        if candidate.impl == impl:
            if candidate.refusal is not None:
                anywhere = f"use impl={candidates[-1].impl!r}"
                remedy = "" if anywhere in candidate.refusal else f"; {anywhere}"
                raise ValueError(f"{op}: impl={impl!r} cannot run here: {candidate.refusal}{remedy}")
            return Choice(impl, "named by the caller")
    known = ", ".join(repr(candidate.impl) for candidate in candidates)
    raise ValueError(f"{op}: unknown impl={impl!r}; expected 'auto' or one of {known}")


def traced_reference(device: torch.device, dtype: torch.dtype) -> Candidate:
    """The reference of an op that is plain torch, left to Inductor where the caller compiles."""
    width = "fp64" if dtype == torch.float64 else "fp32"
    return Candidate("reference", f"plain torch on {device.type}, computing in {width}; Inductor fuses it in a graph")
