"""One op at one shape: its inputs, everything that computes it, and the least that must be moved and multiplied."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from deltatune.bench.shapes import Shape
from deltatune.bench.workload import LONGEST, SHORTEST, draw_lengths
from deltatune.ops import Choice
from deltatune.packing.sequences import Sequences

__all__ = [
    "COMPILED",
    "Case",
    "Function",
    "Setting",
    "Tensors",
    "Variant",
    "Work",
    "compiled",
    "imported",
    "normal",
    "ours",
]

Tensors: TypeAlias = Mapping[str, Tensor]
Function: TypeAlias = Callable[[Tensors], Tensor | tuple[Tensor, ...]]

COMPILED: Final = "torch.compile(reference)"


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        name: in tables and records.
        by: ``"deltatune"``, ``"compile"`` (the reference under torch.compile), ``"stock"`` or ``"library"``.
        build: the function; an ImportError or a ValueError of it is the reason why there is none here.
        packed: False for one that knows no documents, which is held to the reference on a single one.
    """

    name: str
    by: str
    build: Callable[[], Function]
    packed: bool = True


@dataclass(frozen=True)
class Work:
    """The least an op must do, each input read once and each output written once; backward comes on top of forward.

    Attributes:
        forward_bytes: of the tensors that grow with the tokens; weights are left out.
        backward_bytes: the inputs and the output's gradient read again, the inputs' gradients written.
        copy_bytes: the size of the tensor whose copy gives the bandwidth.
        gemm: m, k and n of the product that gives the FLOP rate; None for an op without matrix products.
    """

    forward_bytes: int
    backward_bytes: int
    copy_bytes: int
    gemm: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        op: its public name.
        config: of the record: shape letters, dtypes, documents.
        draw: seed -> inputs on the device, without gradients.
        outputs: names of the results.
        trained: the inputs whose gradients are timed, as in a step that trains adapters.
        checked: those whose gradients the gate compares besides, such as those of weights.
        reference: the specification.
        unpacked: the same where each row is one document, for variants that know no others.
        budget: inputs and exact results -> the error allowed to be doubled; by default the reference's own.
        variants: what is compared.
        work: the least to be done.
        auto: which of ours ``impl="auto"`` takes.
    """

    op: str
    config: Mapping[str, object]
    draw: Callable[[int], dict[str, Tensor]]
    outputs: tuple[str, ...]
    trained: tuple[str, ...]
    reference: Function
    variants: Sequence[Variant]
    work: Work
    auto: str
    checked: tuple[str, ...] = ()
    unpacked: Function | None = None
    budget: Callable[[Tensors, Tensors], dict[str, float]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share.

    Attributes:
        device: where they run.
        dtype: of activations and weights.
        seed: of the documents' lengths.
        documents: how many of them, of about equal length; by default lengths are drawn.
        rank: of adapters.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    documents: int | None = None
    rank: int = 16

    def lengths(self, tokens: int) -> list[int]:
        """Those of the documents, as in the training benchmark."""
        if self.documents is not None:
            ends = [tokens * i // self.documents for i in range(self.documents + 1)]
            return [end - start for start, end in pairwise(ends)]
        return draw_lengths(tokens, shortest=min(SHORTEST, tokens), longest=LONGEST, seed=self.seed)

    def sequences(self, tokens: int) -> Sequences:
        """The documents."""
        return Sequences.from_lengths(self.lengths(tokens)).to(self.device)

    def config(self, shape: Shape, tokens: int, **sizes: object) -> dict[str, object]:
        """What a record says of a case."""
        lengths = self.lengths(tokens)
        about = {"model": shape.name, "T": tokens, **sizes, "dtype": str(self.dtype).removeprefix("torch.")}
        return about | {"documents": len(lengths), "lengths": lengths}

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed values on the generator's device."""
    return (scale * torch.randn(*shape, generator=generator, device=generator.device)).to(dtype)


def ours(impls: Sequence[str], choose: Callable[[str], Choice], function: Callable[[str], Function]) -> list[Variant]:
    """Our implementations of an op; one that cannot run here says so when it is built."""

    def build(impl: str) -> Function:
        choose(impl)
        return function(impl)

    return [Variant(impl, "deltatune", lambda impl=impl: build(impl)) for impl in impls]  # type: ignore[misc]


def compiled(function: Function) -> Variant:
    """Inductor's version of the reference, for the shapes of the case alone."""
    return Variant(COMPILED, "compile", lambda: torch.compile(function, fullgraph=True, dynamic=False))


def imported(module: str, name: str) -> Any:
    """Something of a package that need not be installed.

    Raises:
        ImportError: there is no such package here, or nothing of this name in it.
    """
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"{module} has no {name}")
    return getattr(found, name)
