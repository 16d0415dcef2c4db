"""What other tools (Liger, kernels from the Hub) put into a model, and what becomes of it once it is prepared."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from deltatune.hf.forwards import foreign_forward, named
from deltatune.subclass import Swapped, stock_class

__all__ = ["Patch", "patches", "replaced_rotary", "rotates_otherwise"]

#: Packages whose classes are the model's own, or adapters and quantised layers that are called like any other.
_OWN_PACKAGES: Final = frozenset({"torch", "transformers", "peft", "bitsandbytes", "torchao", "deltatune"})
#: Rotates as transformers does, so that another function may do it in its place.
_SAME_ROTATION: Final = ("liger_kernel.",)


@dataclass(frozen=True)
class Patch:
    """How many functions or classes (``what``) made room for another tool's (``by``), and what a call makes of that."""

    what: str
    by: str
    count: int
    outcome: str


def patches(base: nn.Module, text_model: nn.Module) -> list[Patch]:
    """Everything of the kind that can be seen in a prepared model."""
    counts = Counter((*_of_model(base, text_model), *_of_modules(base, text_model)))
    return [Patch(what, by, count, outcome) for (what, by, outcome), count in counts.items()]


def _of_model(base: nn.Module, text_model: nn.Module) -> Iterator[tuple[str, str, str]]:
    stock = stock_class(base)
    if base is not text_model and stock.forward.__module__ != stock.__module__:
        yield f"{stock.__name__}.forward", named(stock.forward), "called for logits; the loss of labels= is ours"
    put = foreign_forward(base)
    if base is not text_model and put is not None:
        yield f"{stock.__name__}.forward", put, "called; its loss sees no target across documents"
    rotary = replaced_rotary(text_model)
    if rotary is not None:
        yield "apply_rotary_pos_emb", rotary, "not called: rms_norm_rope rotates q and k"
    cross_entropy: Any = torch.nn.functional.cross_entropy
    if cross_entropy.__module__ != "torch.nn.functional":
        yield "cross_entropy", named(cross_entropy), "called where logits are built; linear_cross_entropy elsewhere"


def _of_modules(base: nn.Module, text_model: nn.Module) -> Iterator[tuple[str, str, str]]:
    own = _OWN_PACKAGES | {stock_class(text_model).__module__.partition(".")[0]}
    for module in text_model.modules():
        stock, put = stock_class(module), foreign_forward(module)
        wraps = "wraps our forward" if isinstance(module, Swapped) else "called"
        if module is not base and put is not None:
            yield stock.__name__, put, wraps
        elif stock.__module__.partition(".")[0] not in own:
            yield stock.__name__, f"{stock.__module__}.{stock.__qualname__}", wraps


def replaced_rotary(text_model: nn.Module) -> str | None:
    """What took the place of the rotary function that a family's attention calls; None where it is the stock one."""
    module = sys.modules.get(stock_class(text_model).__module__)
    function = getattr(module, "apply_rotary_pos_emb", None)
    if function is None or function.__module__ == stock_class(text_model).__module__:
        return None
    return named(function)


def rotates_otherwise(text_model: nn.Module) -> str | None:
    """Why a family's attention cannot rotate q and k by its own op."""
    rotary = replaced_rotary(text_model)
    if rotary is None or rotary.startswith(_SAME_ROTATION):
        return None
    return (
        f"apply_rotary_pos_emb of {stock_class(text_model).__module__} was replaced by {rotary}, and our attention "
        "rotates by its own op; put the function of transformers back before prepare"
    )
