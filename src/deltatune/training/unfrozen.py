"""Parameters of the base model that train by their names: in place of all, or whole beside adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.training.quantized_weights import check_frozen

__all__ = ["freeze_others", "whole_modules"]

_KEY = "training.unfrozen_parameters"


def freeze_others(model: nn.Module, patterns: Sequence[str]) -> None:
    """Only parameters in whose names a pattern is found train.

    Raises:
        UserError: a pattern that matches nothing, a weight in few bits, or a tower that text never reaches.
    """
    names = _matching(model, patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def whole_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The modules that hold the matching parameters and no others, for PEFT's ``modules_to_save``.

    PEFT saves modules with an adapter, not parameters, so a module that holds others as well cannot be saved as it is.

    Raises:
        UserError: as ``freeze_others``, and parameters that PEFT would not save, or that are another module's as well.
    """
    names = _matching(model, patterns)
    found = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    head = hf_model.head_of(model)
    for path in found:
        module = model.get_submodule(path)
        others = [name for name, _ in module.named_parameters() if f"{path}.{name}" not in names]
        if others or any(True for _ in module.children()):
            raise UserError(
                f"{_KEY}: with adapters whole modules train, and {path} holds {', '.join(others[:1]) or 'modules'} as "
                "well; match all of a module without others inside, or train without a section lora"
            )
        if head is not None and module is not head and getattr(module, "weight", None) is head.weight:
            raise UserError(
                f"{_KEY}: {path} is tied to the head, and beside adapters PEFT would train a copy that is not; train "
                "without a section lora, or name embeddings as targets of it"
            )
    return found


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        try:
            matching = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"{_KEY}: {pattern!r} is no regular expression: {error}") from error
        if not matching:
            raise UserError(f"{_KEY}: {pattern!r} matches no parameter; their names are such as {names[-1]}")
        check_frozen(model, matching)
        if towers := [name for name in matching if name in frozen]:
            raise UserError(f"{_KEY}: {pattern!r} matches {towers[0]}, of a tower that text gives no gradient")
        found.update(matching)
    return found
