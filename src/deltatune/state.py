"""What the layers of one prepared model share: what ``prepare`` was asked, and what was learned since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.compile.auto import AutoCheckpointing
    from deltatune.compile.graphs import CompileOptions

__all__ = ["Facts", "Options", "State"]


@dataclass(frozen=True)
class Options:
    """What ``prepare`` decided; nothing changes it.

    Attributes:
        kernels: op name -> implementation that was asked for.
        mask_form: what the stock text model takes in place of a mask it would build: ``"mapping"`` or ``"4d"``.
        layer_types: the names such a mapping is asked for.
        compile: how the layers are compiled; None runs them eagerly.
        checkpointing: ``"none"``, ``"layer"``, ``"auto"`` or the share of activations that may stay.
        lora: ``"auto"``, ``"fused"`` or ``"stock"``.
        stock_config: the text model's own config, where a copy that names our attention stands in for it.
        stock_attention: the implementation that config named when the model was prepared.
    """

    kernels: Mapping[str, str]
    mask_form: str
    layer_types: tuple[str, ...]
    compile: CompileOptions | None = None
    checkpointing: str | float = "none"
    lora: str = "auto"
    stock_config: Any = None
    stock_attention: str | None = None


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
    """Plain data, so a deepcopy or pickle of the model carries it."""

    options: Options
    facts: Facts = field(default_factory=Facts)

    @property
    def checkpointing(self) -> str | float:
        """The setting in force: ``"none"`` until ``"auto"`` has decided."""
        if self.facts.auto is None:
            return self.options.checkpointing
        choice = self.facts.auto.choice
        return "none" if choice is None else choice.setting
