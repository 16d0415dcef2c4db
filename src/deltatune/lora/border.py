"""A frozen weight inside a larger buffer: taken in as a view, known again, and given back."""

# N output width, K input width

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["give_back", "is_inside", "take_in"]


def take_in(weight: nn.Parameter, *, rows: int, columns: int) -> Tensor:
    """A buffer ``[N + rows, K + columns]`` that holds the weight in its corner and zeros elsewhere.

    The Parameter stays the object it was and becomes a view of the corner; its old storage is free once nothing else
    holds it. Without rows and columns the buffer is the weight's own storage.
    """
    outer, inner = weight.shape
    # a buffer made in inference mode could never be saved for a backward
    with torch.inference_mode(False), torch.no_grad():
        if not rows and not columns:
            weight.data = weight.data.contiguous()
            return weight.data
        buffer = weight.new_zeros(outer + rows, inner + columns)
        buffer[:outer, :inner] = weight.data
        weight.data = buffer[:outer, :inner]
    return buffer


def is_inside(weight: object, buffer: Tensor) -> bool:
    """Whether the weight is still the view of the buffer's corner; moving, casting or copying it makes it another."""
    return (
        type(weight) is nn.Parameter  # not one that sharding put in its place
        and weight.data_ptr() == buffer.data_ptr()
        and weight.dtype == buffer.dtype
        and weight.device == buffer.device
        and weight.stride() == buffer.stride()
    )


def give_back(weight: nn.Parameter, buffer: Tensor) -> None:
    """Makes the weight a plain contiguous tensor again, where it lies in the buffer."""
    if is_inside(weight, buffer) and not weight.is_contiguous():
        with torch.inference_mode(False), torch.no_grad():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
