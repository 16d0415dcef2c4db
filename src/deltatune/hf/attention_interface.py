"""Variable-length attention as an entry of transformers' attention interface, for families without own layers."""

# B rows, T tokens a row, N query heads, M key-value heads, D head dim

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from deltatune import ops
from deltatune.packing.sequences import Sequences

__all__ = ["NAME", "install", "set_config", "uninstall"]

#: No "flash" in the name: transformers would look for the flash-attn package when a model is built with it.
NAME = "deltatune_varlen"

_WINDOW = "_deltatune_window"
_IMPL = "_deltatune_impl"


def install(text_model: Any, impl: str) -> None:
    """Gives a text model our attention, by a config that names it.

    The entry is a new name: models that use another implementation never see it. Noted on every module is what
    ``packed_attention`` reads there: which implementation ``prepare`` was asked for, and, on attention modules, whether
    the config gives the layer a sliding window. Decided here and not there: a layer index read while tracing would be
    a graph for each layer.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, packed_attention)
        # a cached call builds the mask that its stock attention reads
        AttentionMaskInterface.register(NAME, sdpa_mask)
    ours = copy.copy(text_model.config)
    ours._attn_implementation_internal = NAME
    set_config(text_model, ours)
    for module in text_model.modules():
        module.__dict__[_IMPL] = impl
        index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
        if isinstance(index, int) and config is not None:
            module.__dict__[_WINDOW] = _has_window(config, index)


def uninstall(text_model: Any, stock_config: Any) -> None:
    """Undoes ``install``."""
    set_config(text_model, stock_config)
    for module in text_model.modules():
        module.__dict__.pop(_WINDOW, None)
        module.__dict__.pop(_IMPL, None)


def set_config(text_model: Any, config: Any) -> None:
    """Replaces the config of the text model and of what reads it there; another model may share the object."""
    before = text_model.config
    for module in text_model.modules():
        if getattr(module, "config", None) is before:
            module.config = config


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [B, N, T, D]``, ``key``, ``value [B, M, T, D]`` -> ``[B, T, N, D]``.

    Raises:
        ValueError: dropout, soft-capped logits, attention sinks, attention that is not causal, a mask or a window that
            variable-length attention would drop, or layers that do not hand boundaries on.
    """
    whole = key.shape[2]
    if sequences is None and attention_mask is not None and attention_mask.shape[-1] == 1 < whole:
        raise ValueError(
            f"the layers of this model do not hand their keyword arguments on to {type(module).__name__}, so it cannot "
            "learn where documents begin; the model cannot be prepared"
        )
    if sequences is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        extra = {} if sliding_window is None else {"sliding_window": sliding_window}
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra, **kwargs
        )
        return output
    unsupported = {
        "attention dropout": dropout,
        "soft-capped attention logits": kwargs.get("softcap"),
        "attention sinks": kwargs.get("s_aux") is not None,
        "attention that is not causal": kwargs.get("is_causal", getattr(module, "is_causal", True)) is False,
        "a mask of the model's own making": attention_mask is not None and attention_mask.shape[-1] == whole > 1,
        "a sliding window that only a mask expresses": sliding_window is None and getattr(module, _WINDOW, False),
    }
    for feature, present in unsupported.items():
        if present:
            raise ValueError(f"{feature} cannot be honoured on packed documents; {type(module).__name__} asks for it")
    out = ops.varlen_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        sequences=sequences,
        scale=scaling,
        window=sliding_window,
        impl=getattr(module, _IMPL),
    )
    return out, None


def _has_window(config: Any, index: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types:
        return index < len(types) and bool(types[index] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and bool(getattr(config, "use_sliding_window", True))
