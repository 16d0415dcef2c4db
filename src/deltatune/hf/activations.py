"""Activations that the ops know by name."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS

from deltatune.hf.hooks import is_hooked

__all__ = ["activation_of"]

_SILU: Final = (nn.SiLU, ACT2CLS["silu"])
_GELU_TANH: Final = ACT2CLS["gelu_pytorch_tanh"]


def activation_of(function: Any) -> str | None:
    """``"silu"`` or ``"gelu_tanh"`` of a function that is it and nothing else, so that it need not be called."""
    if function is F.silu:
        return "silu"
    if not isinstance(function, nn.Module) or is_hooked(function):
        return None
    if type(function) in _SILU:
        return "silu"
    by_torch = type(function) is _GELU_TANH and isinstance(function.act, functools.partial)
    by_name = type(function) is nn.GELU and function.approximate == "tanh"
    return "gelu_tanh" if by_torch or by_name else None
