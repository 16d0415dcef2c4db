"""What the layers of one prepared model share: what ``prepare`` was asked, and what was learned since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from deltatune.options import Options

if TYPE_CHECKING:
    from deltatune.compile.graphs import Graphs

__all__ = ["AutoCheckpointing", "Choice", "Facts", "State", "bound"]

T = TypeVar("T")


@contextmanager
def bound(variable: ContextVar[T], value: T) -> Iterator[T]:
    """``variable`` is ``value`` inside, in this thread (or task) alone."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


class Choice(NamedTuple):
    """A checkpointing setting that was chosen.

    Attributes:
        setting: ``"none"``, a share or ``"layer"``.
        predicted_bytes: the peak of a step that was predicted for it.
        reason: why it was taken, in words.
    """

    setting: str | float
    predicted_bytes: int
    reason: str


@dataclass
class AutoCheckpointing:
    """What ``"auto"`` goes by, and what it took.

    Attributes:
        optimizer: transformers' name of the optimizer that will train.
        accumulates: whether gradients of earlier batches are there while a batch runs.
        compute_dtype: of activations under autocast; None for the weights' own.
        tokens: of the batch it was decided for; a larger one is decided for again.
        choice: the setting, its predicted peak, and why; None before the first training forward.
    """

    optimizer: str = "adamw_torch_fused"
    accumulates: bool = False
    compute_dtype: torch.dtype | None = None
    tokens: int = 0
    choice: Choice | None = None


@dataclass
class Facts:
    """What only a call can tell; true for every later call, whichever thread makes it.

    Attributes:
        head: ``"linear"`` where logits are the head's output alone; ``"transformed"`` where the model scales or caps
            them afterwards, and the loss takes the whole logits; ``"unknown"`` until the first loss of such a model.
        auto: what ``checkpointing="auto"`` goes by and took; None where the setting was given.
    """

    head: str = "linear"
    auto: AutoCheckpointing | None = None


@dataclass(eq=False)
class State:
    """Plain data, so a deepcopy or pickle of the model carries it; all but the compiled functions.

    Those may keep the model alive, through hooks in it, so they are kept here and nowhere outside of it.
    """

    options: Options
    facts: Facts = field(default_factory=Facts)
    graphs: dict[str | float, Graphs] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles anew."""
        return self.__dict__ | {"graphs": {}}

    @property
    def checkpointing(self) -> str | float:
        """The setting in force: ``"none"`` until ``"auto"`` has decided."""
        if self.facts.auto is None:
            return self.options.checkpointing
        choice = self.facts.auto.choice
        return "none" if choice is None else choice.setting
