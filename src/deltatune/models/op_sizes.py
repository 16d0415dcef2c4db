"""The sizes that a choice of implementation goes by beside device and dtype, read off a model's own modules."""

# K key dim, V value dim, X experts, I width of an expert, E hidden width

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["op_sizes"]


def op_sizes(text_model: nn.Module, head: nn.Module | None) -> dict[str, dict[str, Any]]:
    """Op -> what its ``choose_*`` takes beside device and dtype, where all modules that tell it agree.

    Args:
        text_model: stock or prepared.
        head: of the language model; None without one.
    """
    found: dict[str, dict[str, Any]] = {}
    for op, (name, read) in _READ.items():
        modules = text_model.modules() if op != "linear_cross_entropy" else [] if head is None else [head]
        values = {value for value in map(read, modules) if value is not None}
        if len(values) == 1:
            found[op] = {name: values.pop()}
    return found


def _attribute(name: str) -> Callable[[nn.Module], int | None]:
    def read(module: nn.Module) -> int | None:
        value = getattr(module, name, None)
        return value if isinstance(value, int) else None

    return read


def _head_dims(module: nn.Module) -> tuple[int, int] | None:
    """K and V."""
    key, value = (_attribute(name)(module) for name in ("head_k_dim", "head_v_dim"))
    return None if key is None or value is None else (key, value)


def _expert_shape(module: nn.Module) -> torch.Size | None:
    """``[X, 2I, E]``."""
    weight = getattr(module, "gate_up_proj", None)
    return weight.shape if isinstance(weight, Tensor) and weight.ndim == 3 else None


#: op -> the keyword of its choice, and what a module says of it
_READ: Final[dict[str, tuple[str, Callable[[nn.Module], Any]]]] = {
    "gated_delta_rule": ("head_dims", _head_dims),
    "causal_conv": ("width", _attribute("conv_kernel_size")),
    "varlen_attention": ("head_dim", _attribute("head_dim")),
    "grouped_mm": ("weight_shape", _expert_shape),
    "linear_cross_entropy": ("width", _attribute("in_features")),
}
