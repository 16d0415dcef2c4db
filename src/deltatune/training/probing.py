"""The independence probe of a run: on its own model, or where no process will hold that, on its first layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.phases import phase
from deltatune.training.checkpoint import load_config, new_model
from deltatune.training.console import RunConsole
from deltatune.training.planned import prepare_by_recipe
from deltatune.verification import VerifyReport, verify

__all__ = ["first_layers", "probe"]


def probe(recipe: Recipe, model: nn.Module, console: RunConsole) -> VerifyReport | None:
    """Probes a model as the recipe says, and shows the report; None where it says not to.

    Raises:
        UserError: a leak; nothing was trained.
    """
    section = recipe.verify
    if not section.enabled:
        return None
    with phase("probing the model"):
        report = verify(model, **section.model_dump(include={"lengths", "tolerance"}, exclude_none=True))
    console.out(str(report), highlight=False)
    if not report.ok:
        raise UserError(f"verify: {report.verdict}; nothing was trained")
    return report


def first_layers(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's model as far as a layer of every type, prepared, its weights at random, on the device.

    Boundaries are kept by what layers and kernels do, whatever the weights; adapters see one token at a time.
    """
    config = copy.deepcopy(load_config(recipe.model))
    _cut(config.get_text_config())
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(generators), torch.device(device):
        model = new_model(recipe.model, config)
    prepare_by_recipe(recipe.model_copy(update={"checkpointing": "none", "compile": None, "lora": None}), model)
    return model


def _cut(text: Any) -> None:
    """Leaves of a text model's config the first layers, one of every type at least."""
    whole, types = text.num_hidden_layers, getattr(text, "layer_types", None) or []
    count = min(whole, max([4, *(types.index(kind) + 1 for kind in types)]))
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # an entry for each layer
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
