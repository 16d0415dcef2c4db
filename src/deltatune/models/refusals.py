"""Reasons a text model cannot be prepared; each check returns one, or None."""

from __future__ import annotations

from typing import Any

__all__ = ["attention_dropout", "delta_net_activation", "unusual_attention"]


def attention_dropout(text_model: Any) -> str | None:
    """Dropout of attention weights, which variable-length kernels do not have."""
    rate = getattr(text_model.config, "attention_dropout", 0.0)
    if rate:
        return f"attention_dropout={rate} cannot be honoured on packed documents; set config.attention_dropout=0"
    return None


def delta_net_activation(text_model: Any) -> str | None:
    """An activation of the short convolution other than SiLU."""
    activation = text_model.config.hidden_act
    if activation not in ("silu", "swish"):
        return (
            f"hidden_act={activation!r} is also the activation of the short convolution, and only 'silu' is "
            "implemented there"
        )
    return None


def unusual_attention(text_model: Any) -> str | None:
    """Attention that variable-length attention does not compute, in a family without own layers."""
    config = text_model.config
    for name in ("attn_logit_softcapping", "attn_logits_soft_cap"):
        if getattr(config, name, None):
            return f"its attention logits are soft-capped ({name}={getattr(config, name)})"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in text_model.named_parameters()):
        return "its attention has sinks"
    if getattr(config, "index_topk", None):
        return f"its attention reads chosen tokens alone (index_topk={config.index_topk})"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal (use_bidirectional_attention)"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "its attention is chunked, which only a mask expresses"
    value_dim, query_dim = getattr(config, "v_head_dim", None), getattr(config, "qk_head_dim", None)
    if value_dim is not None and query_dim is not None and value_dim != query_dim:
        return f"its values are {value_dim} wide a head and its queries {query_dim}"
    return None
