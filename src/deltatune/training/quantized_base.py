"""What the recipe and the checkpoint say of a base in few bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from deltatune.config.schema import Fp8Quantization, ModelSection
from deltatune.errors import UserError, one_line
from deltatune.quantization.released import Released, disagreement, released

__all__ = ["QuantizedBase", "quantized_base"]


@dataclass(frozen=True)
class QuantizedBase:
    """How weights come to be in few bits: read so, or made of wider ones.

    Attributes:
        method: ``quant_method`` of a checkpoint that holds them so.
        format: what they are made into, of a checkpoint that does not.
        blocks: then, whether 128x128 of them share a scale.
    """

    method: str | None = None
    format: str | None = None
    blocks: bool = False

    def without_settings(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config as of a checkpoint in 16 bits."""
        config = copy.deepcopy(config)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        return config


def quantized_base(section: ModelSection, config: PreTrainedConfig) -> QuantizedBase | None:
    """What a section says of a checkpoint with this config; None where transformers loads it as it is.

    Raises:
        UserError: what cannot be read, or is not what the checkpoint holds.
    """
    given = section.quantization
    found: Released | None = None
    try:
        found = released(_settings(config))
    except ValueError as error:
        # transformers may know what it is; a recipe says nothing of it
        if given is not None:
            raise UserError(f"model {section.name_or_path}: {one_line(error)}") from error
    if given is not None:
        blocks = isinstance(given, Fp8Quantization) and given.blocks
        if why := disagreement(given.type, found, blocks=blocks, compute=given.compute):
            raise UserError(why)
        if found is None:
            return QuantizedBase(format=given.type, blocks=blocks)
    return QuantizedBase(method=found.method) if found is not None and found.is_read_here else None


def _settings(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    for part in (config, config.get_text_config()):
        found: Any = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, Mapping) else found.to_dict()
    return None
