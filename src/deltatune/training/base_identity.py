"""Which model a run began with."""

from __future__ import annotations

from torch import nn

from deltatune.config.schema import ModelSection
from deltatune.hf.model import base_model
from deltatune.subclass import stock_class
from deltatune.training.checkpoint import commit_of, origin_of

__all__ = ["base_identity"]


def base_identity(section: ModelSection, model: nn.Module) -> dict[str, str | None]:
    """Which model a run began with: ``name_or_path``, ``revision`` as asked, the Hub's ``commit``, and its ``class``.

    The path of a folder is absolute. ``commit`` is None where no Hub says it.
    """
    base = base_model(model)
    return {
        "name_or_path": str(origin_of(section, section.name_or_path)["pretrained_model_name_or_path"]),
        "revision": section.revision,
        "commit": commit_of(section),
        "class": stock_class(base).__name__,
    }
