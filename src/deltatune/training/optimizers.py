"""Which parameters an optimizer steps at which learning rate, and by which rule."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltatune.config.training_section import TrainingSection
from deltatune.data.report import counted
from deltatune.errors import UserError
from deltatune.hf.model import text_model
from deltatune.lora.parameters import is_parameter_lora
from deltatune.training.muon import MATRICES
from deltatune.training.names import MUON

__all__ = ["TRANSFORMERS_GROUPS", "OptimizerSettings", "optimizer_lines", "parameter_groups"]


@dataclass(frozen=True)
class OptimizerSettings:
    """What a recipe says of groups of parameters beyond transformers' two, with and without weight decay."""

    muon: bool = False
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # regular expression -> peak
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6

    @classmethod
    def of(cls, section: TrainingSection) -> OptimizerSettings:
        """A recipe's."""
        return cls(
            section.optim == MUON, section.learning_rates, section.loraplus_lr_ratio, section.loraplus_lr_embedding
        )

    @property
    def act(self) -> bool:
        """Whether they ask for other groups than transformers makes."""
        return self.muon or bool(self.learning_rates) or self.loraplus_lr_ratio is not None


TRANSFORMERS_GROUPS = OptimizerSettings()


def parameter_groups(
    model: nn.Module, settings: OptimizerSettings, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer takes them, in an order that no value of a setting changes.

    The pattern of ``learning_rates`` that is found in a parameter's name gives its peak learning rate. LoRA+ gives B
    matrices and vectors ``loraplus_lr_ratio`` times the recipe's, and adapters of embeddings ``loraplus_lr_embedding``
    (as PEFT's ``create_loraplus_optimizer``). All others have the recipe's. Weight decay acts as in transformers: not
    on biases and norms. With Muon a group also says whether it holds weights of hidden linear layers.

    Raises:
        UserError: a pattern that is no regular expression, or matches no trained parameter or another's.
    """
    from transformers import Trainer  # which imports datasets, and pandas with it

    decays: Container[str] = Trainer.get_decay_parameter_names(None, model)
    matrices = _hidden_matrices(model) if settings.muon else set()
    patterns = {pattern: _compiled(pattern) for pattern in settings.learning_rates}
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        label, peak = _rate(name, parameter, settings, patterns, learning_rate)
        key = (label, name in decays, id(parameter) in matrices)
        decay = weight_decay if name in decays else 0.0
        group = groups.setdefault(key, {"params": [], "lr": peak, "weight_decay": decay, "label": label})
        if settings.muon:
            group[MATRICES] = id(parameter) in matrices
        group["params"].append(parameter)
    for pattern in patterns:
        if all(label != pattern for label, _, _ in groups):
            raise UserError(f"training.learning_rates: {pattern!r} {_idle(model, patterns[pattern])}")
    return list(groups.values())


def optimizer_lines(model: nn.Module, section: TrainingSection) -> list[str]:
    """What of a model a recipe steps how, a line for each group; none where the groups are transformers' own.

    Raises:
        UserError: as ``parameter_groups``, or no matrix that Muon could step.
    """
    settings = OptimizerSettings.of(section)
    if not settings.act:
        return []
    groups = parameter_groups(model, settings, learning_rate=section.learning_rate, weight_decay=section.weight_decay)
    if settings.muon and not any(group[MATRICES] for group in groups):
        raise UserError("training.optim: muon steps weights of hidden linear layers, and none of them trains")
    return [_line(group) for group in groups]


def _line(group: Mapping[str, Any]) -> str:
    count = sum(parameter.numel() for parameter in group["params"])
    rule = "" if MATRICES not in group else ", by Muon" if group[MATRICES] else ", by AdamW"
    return (
        f"learning rate {group['lr']:.3g} ({group['label']}), weight decay {group['weight_decay']:g}{rule}: "
        f"{count:,} parameters in {counted(len(group['params']), 'tensor')}"
    )


def _rate(
    name: str,
    parameter: nn.Parameter,
    settings: OptimizerSettings,
    patterns: Mapping[str, re.Pattern[str]],
    learning_rate: float,
) -> tuple[str, float]:
    fitting = [pattern for pattern, compiled in patterns.items() if compiled.search(name)]
    if len(fitting) > 1:
        raise UserError(f"training.learning_rates: {name} is matched by {fitting[0]!r} and by {fitting[1]!r}; make one")
    if fitting:
        return fitting[0], settings.learning_rates[fitting[0]]
    ratio = settings.loraplus_lr_ratio
    if ratio is not None:
        if "lora_embedding_" in name:
            return "LoRA+ of embeddings", settings.loraplus_lr_embedding
        if "lora_B" in name or parameter.ndim == 1:
            return "LoRA+ B", learning_rate * ratio
    return "the recipe's", learning_rate


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Weights of linear layers inside the decoder, so not the head; of an adapter that stacks its experts none."""
    stacked = {id(part) for module in model.modules() if is_parameter_lora(module) for part in _factors(module)}
    return {
        id(module.weight)
        for module in text_model(model).modules()
        if isinstance(module, nn.Linear) and id(module) not in stacked and module.weight.ndim == 2
    }


def _factors(wrapper: Any) -> list[nn.Module]:
    return [*wrapper.lora_A.values(), *wrapper.lora_B.values()]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"training.learning_rates: {pattern!r} is no regular expression: {error}") from error


def _idle(model: nn.Module, pattern: re.Pattern[str]) -> str:
    if any(pattern.search(name) for name, _ in model.named_parameters()):
        return "matches frozen parameters alone, which have no learning rate"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return f"matches no parameter; those that train have names such as {', '.join(trained[:1])}"
