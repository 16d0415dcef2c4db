"""Devices by the names that people give."""

from __future__ import annotations

import torch

from deltatune.errors import UserError

__all__ = ["usable_device"]


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: no such device, or none that can be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--device {name} cannot be used here: {first}") from error
    return device
