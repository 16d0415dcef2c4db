"""LoRA by PEFT, with every name in the recipe checked against the model: nothing that matches nothing is ignored."""

from __future__ import annotations

import difflib
import re

from torch import nn

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError, one_line
from deltatune.hf import model as hf_model

__all__ = ["adapt"]


def adapt(model: nn.Module, section: LoraSection | None) -> nn.Module:
    """The model as a recipe trains it: with LoRA adapters and everything else frozen, or, without a section, whole.

    Towers for images and sound are frozen: text gives them no gradient, and a report should not say they train. So
    ``all-linear`` means the text model's linear layers. Adapters are kept in float32, or in the base weights' dtype
    with ``adapter_dtype: model``.

    Raises:
        UserError: a target, a pattern or a module to save that matches nothing (with the nearest names), a layer index
            out of range, or a combination that PEFT refuses.
    """
    towers = _towers(model)
    for name in towers:
        model.get_submodule(name).requires_grad_(False)
    if section is None:
        return model
    import peft

    arguments = section.peft_arguments()
    _check_names(model, section)
    if section.target_modules == "all-linear" and towers and section.exclude_modules is None:
        arguments["exclude_modules"] = rf"(?:{'|'.join(map(re.escape, towers))})\..*"
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
        adapted: nn.Module = peft.get_peft_model(
            model, config, autocast_adapter_dtype=section.adapter_dtype == "float32"
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {one_line(error)}") from error
    return adapted


def _check_names(model: nn.Module, section: LoraSection) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        wanted = getattr(section, field)
        if wanted is not None and wanted != "all-linear":
            _each_matches(f"lora.{field}", wanted, names, model)
    count = int(hf_model.text_config(model).num_hidden_layers)
    for index in section.layers_to_transform or ():
        if not 0 <= index < count:
            raise UserError(f"lora.layers_to_transform: {index} is no layer; the model has layers 0 to {count - 1}")


def _each_matches(
    field: str, wanted: str | tuple[str, ...] | dict[str, int], names: list[str], model: nn.Module
) -> None:
    """As PEFT reads them: one string is a regular expression over full names, a pattern one for the end of a name, and
    of several names each is the end of one.
    """
    for entry in (wanted,) if isinstance(wanted, str) else wanted:
        ending = re.escape(entry) if isinstance(wanted, tuple) else entry
        expression = entry if isinstance(wanted, str) else rf"(.*\.)?({ending})"
        try:
            found = any(re.fullmatch(expression, name) for name in names)
        except re.error as error:
            raise UserError(f"{field}: {entry!r} is no regular expression: {error}") from error
        if not found:
            raise UserError(f"{field}: {entry!r} matches no module{_nearest(entry, model)}")


def _nearest(entry: str, model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    wanted = re.sub(r"\W+", " ", entry).split()
    close = difflib.get_close_matches(wanted[-1] if wanted else entry, linear, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else f"; linear layers here: {', '.join(linear)}"


def _towers(model: nn.Module) -> list[str]:
    """Names of the outermost modules outside the text model that hold linear layers, the head aside."""
    decoder = hf_model.text_model(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = hf_model.head_of(model)
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and prefix and not name.startswith(f"{prefix}.")
    ]
    depth = prefix.count(".") + 1
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in outside))
