"""Reasons a text config cannot be prepared; each check returns one, or None."""

from __future__ import annotations

from typing import Any

__all__ = ["attention_dropout", "delta_net_activation"]


def attention_dropout(config: Any) -> str | None:
    """Dropout of attention weights, which variable-length kernels do not have."""
    rate = getattr(config, "attention_dropout", 0.0)
    if rate:
        return f"attention_dropout={rate} cannot be honoured on packed documents; set config.attention_dropout=0"
    return None


def delta_net_activation(config: Any) -> str | None:
    """An activation of the short convolution other than SiLU."""
    if config.hidden_act not in ("silu", "swish"):
        return (
            f"hidden_act={config.hidden_act!r} is also the activation of the short convolution, and only 'silu' is "
            "implemented there"
        )
    return None
