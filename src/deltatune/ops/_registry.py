"""Which implementation of an op runs, and why: one protocol for all ops, used by the ops themselves and by reports."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch

__all__ = ["Choice", "Provider", "Spec", "Support", "choose", "otherwise", "support", "traced_reference"]


@dataclass(frozen=True)
class Support:
    """Whether an implementation runs, and the reason in words: what speaks for it, or why it cannot and the remedy."""

    supported: bool
    reason: str


@dataclass(frozen=True)
class Provider:
    """An implementation of an op.

    Attributes:
        name: as passed to ``impl=``.
        supports: spec -> whether it runs there; it reads the spec and what is installed, and leaves nothing in a graph.
        module: where its functions are, imported when it first runs.
    """

    name: str
    supports: Callable[[Any], Support]
    module: str


@dataclass(frozen=True)
class Spec:
    """What a choice goes by. An op's own spec adds the sizes its providers ask about; None leaves a size out.

    Attributes:
        device: of the inputs.
        dtype: of the inputs; where they differ, the one that asks most of a device.
        op: the op's public name.
        providers: in order of preference; the last one runs anywhere.
    """

    op: ClassVar[str]
    providers: ClassVar[tuple[Provider, ...]]

    device: torch.device
    dtype: torch.dtype

    def preferred(self) -> tuple[Provider, ...]:
        """``providers`` in the order in which ``"auto"`` asks them."""
        return self.providers

    @classmethod
    def load(cls, impl: str) -> ModuleType:
        """The module with the functions of the provider of this name."""
        return importlib.import_module(next(provider.module for provider in cls.providers if provider.name == impl))


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason in words."""

    impl: str
    reason: str


def choose(spec: Spec, impl: str = "auto") -> Choice:
    """Takes the first provider that runs for ``"auto"``, otherwise exactly the one that is named.

    Raises:
        ValueError: a name no provider has, or one that cannot run here (with its remedy).
    """
    asked = [provider for provider in spec.preferred() if impl in ("auto", provider.name)]
    if not asked:
        known = ", ".join(repr(provider.name) for provider in spec.preferred())
        raise ValueError(f"{spec.op}: unknown impl={impl!r}; expected 'auto' or one of {known}")
    refusals = []
    for provider in asked:
        found = provider.supports(spec)
        if found.supported:
            return Choice(provider.name, found.reason if impl == "auto" else "named by the caller")
        refusals.append(found.reason)
    if impl == "auto":
        raise ValueError(f"{spec.op}: no implementation can run here: " + "; ".join(refusals))
    last = spec.providers[-1].name
    remedy = "" if f"use impl={last!r}" in refusals[0] else f"; use impl={last!r}"
    in_recipe = f"kernels.{spec.op}: {last} in a recipe"
    raise ValueError(f"{spec.op}: impl={impl!r} cannot run here: {refusals[0]}{remedy} ({in_recipe})")


def support(reason: str, refusal: str | None = None) -> Support:
    """What speaks for a provider, unless there is a refusal."""
    return Support(True, reason) if refusal is None else Support(False, refusal)


def otherwise(preferred: Callable[[Any], Support]) -> Callable[[Any], Support]:
    """Of a reference that nothing speaks for but what another provider lacks."""
    return lambda spec: Support(True, preferred(spec).reason)


def traced_reference(spec: Spec) -> Support:
    """Of a reference that is plain torch, left to Inductor where the caller compiles."""
    width = "fp64" if spec.dtype == torch.float64 else "fp32"
    return Support(True, f"plain torch on {spec.device.type}, computing in {width}; Inductor fuses it in a graph")
