"""Questions about a transformers model, with or without PEFT around it, each answered once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune.hf.experts import has_divided_experts

__all__ = [
    "base_model",
    "compute_dtype",
    "device_of",
    "has_shards",
    "head_of",
    "in_mode",
    "is_sharded",
    "text_config",
    "text_model",
]

#: What activations can be computed in; quantised weights are stored in something else.
_COMPUTED_IN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside whatever PEFT put around it."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def text_model(model: nn.Module) -> Any:
    """The module that holds the decoder layers.

    Raises:
        ValueError: not a decoder of transformers.
    """
    from transformers import PreTrainedModel

    base = base_model(model)
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"expected a transformers or PEFT model, got {name} without decoder layers")
    if base.config.is_encoder_decoder:
        raise ValueError(f"expected a decoder, got {name}, an encoder-decoder")
    decoder = base.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not hasattr(decoder, "config"):
        raise ValueError(
            f"expected a text model with its decoder layers in an attribute `layers` (a ModuleList), got {name} whose "
            f"{type(decoder).__name__} has no such attribute; a model that keeps them elsewhere cannot be prepared"
        )
    return decoder


def head_of(model: nn.Module) -> Any:
    """The language model's head, as PEFT may have wrapped it; None without one."""
    read: Any = getattr(base_model(model), "get_output_embeddings", None)
    return read() if callable(read) else None


def text_config(model: nn.Module) -> Any:
    """The config of the text model, also inside a multimodal one."""
    config: Any = model.config
    return config.get_text_config()


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs; one without storage will run on the accelerator, where there is one."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():  # accelerate keeps offloaded weights on the meta device between calls
        planned = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
        if planned is not None:
            return torch.device(planned)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What activations are computed in outside autocast: the dtype of the embedding, with which they begin.

    Where that is quantised, the dtype that most of the other weights have.
    """
    embedding = getattr(base_model(model), "get_input_embeddings", lambda: None)()
    # PEFT's wrapper would put trained rows in first, and where weights are sharded wait for the other ranks
    weight = getattr(getattr(embedding, "original_module", embedding), "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in _COMPUTED_IN:
        return weight.dtype
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.dtype in _COMPUTED_IN:
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())


def is_sharded(part: nn.Module | Tensor) -> bool:
    """Whether FSDP (1 or 2), tensor or expert parallelism holds parts of a tensor, or of anything in a module."""
    return has_shards(part) or (isinstance(part, nn.Module) and has_divided_experts(part))


def has_shards(part: nn.Module | Tensor) -> bool:
    """Whether FSDP (1 or 2) or tensor parallelism does."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if isinstance(part, Tensor):
        return isinstance(part, DTensor)
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in part.modules()) or any(
        isinstance(parameter, DTensor) for parameter in part.parameters()
    )


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module is in training (or evaluation) mode inside; each in its own as before, after."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        yield
    finally:
        for module, before in modes.items():
            module.training = before
