"""Autocast around an op that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast"]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as torch treats its own matrix products; fp64 is left alone."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
