"""What the layers of one prepared model share: what ``prepare`` was asked, and what was learned since."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from deltatune.cost import WHOLE, ExpertSplit
from deltatune.options import Options
from deltatune.packing.group import Recurrent, SequenceGroup

if TYPE_CHECKING:
    from deltatune.compile.graphs import Graphs

__all__ = ["AutoCheckpointing", "CheckpointingChoice", "Facts", "Precision", "State", "bound"]

T = TypeVar("T")


@contextmanager
def bound(variable: ContextVar[T], value: T) -> Iterator[T]:
    """``variable`` is ``value`` inside, in this thread (or task) alone."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


class CheckpointingChoice(NamedTuple):
    """A checkpointing setting that was chosen."""

    setting: str | float  # "none", a share or "layer"
    predicted_bytes: int  # the peak of a step that was predicted for it
    reason: str  # why it was taken, in words


@dataclass
class AutoCheckpointing:
    """What ``"auto"`` goes by, and what it took."""

    optimizer: str = "adamw_torch_fused"  # transformers' name of the optimizer that will train
    accumulates: bool = False  # whether gradients of earlier batches are there while a batch runs
    compute_dtype: torch.dtype | None = None  # of activations under autocast; None for the weights' own
    shard: int = 1  # ranks among which the weights are divided
    sequence: int = 1  # ranks that hold a pack together
    recurrent: Recurrent = "heads"  # how they divide recurrent layers
    experts: ExpertSplit = WHOLE  # how the routed experts are divided
    tokens: int = 0  # of the batch it was decided for; a larger one is decided for again
    choice: CheckpointingChoice | None = None  # None before the first training forward


class Precision(NamedTuple):
    """What layers compute in, where their weights are stored in another dtype."""

    dtype: torch.dtype
    gathered: bool  # float weights of any dtype reach layers in it; else autocast casts them where they are read


@dataclass
class Facts:
    """What only a call can tell; true for every later call, whichever thread makes it."""

    # "linear" where logits are the head's output alone; "transformed" where the model scales or caps them afterwards,
    # and the loss takes the whole logits; "unknown" until the first loss of such a model
    head: str = "linear"
    auto: AutoCheckpointing | None = None  # None where the setting was given
    precision: Precision | None = None  # None: in the dtype of the weights, as far as is known before a call

    @property
    def gathered_in(self) -> torch.dtype | None:
        """The dtype in which weights reach layers; None for their own."""
        return self.precision.dtype if self.precision is not None and self.precision.gathered else None


@dataclass(eq=False)
class State:
    """Plain data, so a deepcopy or pickle of the model carries it; all but the compiled functions.

    Those may keep the model alive, through hooks in it, so they are kept here and nowhere outside of it.
    """

    options: Options
    facts: Facts = field(default_factory=Facts)
    sequence: SequenceGroup | None = None  # whose ranks hold a pack together; None where each holds packs of its own
    graphs: dict[str | float, Graphs] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles anew, and in another process has no group: the process is a part of one, not the model."""
        return self.__dict__ | {"graphs": {}, "sequence": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """The copy of a whole model gets a state of its own; that of a part, as PEFT makes, shares the model's."""
        if not any(getattr(type(copied), "whole_model", False) for copied in memo.values()):
            return self
        memo[id(self)] = fresh = State.__new__(State)
        fresh.__dict__.update(copy.deepcopy(self.__getstate__(), memo), sequence=self.sequence)
        return fresh

    @property
    def checkpointing(self) -> str | float:
        """The setting in force: ``"none"`` until ``"auto"`` has decided."""
        if self.facts.auto is None:
            return self.options.checkpointing
        choice = self.facts.auto.choice
        return "none" if choice is None else choice.setting
