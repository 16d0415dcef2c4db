"""Which weights of a model may be held in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from deltatune.hf.experts import experts_layout
from deltatune.hf.model import text_model
from deltatune.quantization.blank import Encoding, blank_weight
from deltatune.quantization.tensor import QuantizedTensor

__all__ = ["has_transposed_experts", "is_interleaved", "quantizable", "set_blank"]

#: Linear layers that are narrow and decide much: routers, gates of shared experts, decay and write strength of the
#: delta rule.
_NARROW: Final = frozenset(("gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba"))


def quantizable(model: nn.Module, encoding: Encoding) -> dict[str, QuantizedTensor]:
    """Weights of linear layers and of fused experts in the decoder layers as they would be held, on the meta device.

    Routers, gates of shared experts, the delta rule's decay and write strength (``in_proj_a``, ``in_proj_b``), whatever
    is no matrix or of a size that cannot be held, and all outside the decoder layers (embeddings, head, towers) is not
    among them.

    Raises:
        ValueError: no decoder of transformers.
    """
    inside = {id(module) for layer in text_model(model).layers for module in layer.modules()}
    names: dict[str, bool] = {}  # and whether they are transposed
    for path, module in model.named_modules():
        if id(module) not in inside:
            continue
        if isinstance(module, nn.Linear):
            if path.rpartition(".")[2] not in _NARROW:
                names[f"{path}.weight"] = False
        elif (layout := experts_layout(module)) is not None:
            names |= dict.fromkeys((f"{path}.{layout.up}", f"{path}.down_proj"), layout.transposed)
    found = {}
    for name, transposed in names.items():
        weight = model.get_parameter(name)
        shape = weight.mT.shape if transposed else weight.shape
        with suppress(ValueError):
            encoding.check(shape)
            found[name] = QuantizedTensor(blank_weight(encoding, shape, "meta"), weight.dtype, transposed=transposed)
    return found


def set_blank(model: nn.Module, weights: Mapping[str, QuantizedTensor]) -> None:
    """Puts weights in few bits, of zeros, in the places of those that a model has, on their devices."""
    for name, like in weights.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        place: Any = module._parameters[key]
        assert place.shape == like.shape, name
        blank = like.mapped(partial(torch.zeros_like, device=place.device), place.dtype)
        module._parameters[key] = nn.Parameter(blank, requires_grad=False)


def has_transposed_experts(model: nn.Module) -> bool:
    """Whether the model's fused experts are ``[G, K, N]``, where checkpoints in few bits hold ``[G, N, K]``."""
    layouts = (experts_layout(module) for module in model.modules())
    return any(layout.transposed for layout in layouts if layout is not None)


def is_interleaved(module: Any, name: str) -> bool | None:
    """Of a Parameter of experts that is gate and up in one, whether their rows alternate; None of any other."""
    layout = experts_layout(module)
    return layout.interleaved if layout is not None and layout.gated and name == layout.up else None
