"""What lies in an adapter's folder, read: or one line that says what is wrong with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pickle import UnpicklingError

import peft
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from deltatune.errors import UserError, one_line
from deltatune.phases import phase

__all__ = ["adapter_config", "adapter_digest", "adapter_weights"]


def adapter_config(folder: Path) -> peft.PeftConfig:
    """The configuration, in PEFT's class for its type.

    Raises:
        UserError: a type that this PEFT does not know, or values that it does not take.
    """
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: its adapter_config.json cannot be read by peft {peft.__version__}: {one_line(error)}"
        ) from error


def adapter_digest(folder: Path) -> str:
    """SHA-256 of the weights' files."""
    digest = hashlib.sha256()
    with phase("computing the digest of the adapter"):
        for path in sorted(folder.glob("adapter_model.*")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The weights, by PEFT's names, on the CPU.

    Raises:
        UserError: a file that is cut off, or none of tensors.
    """
    try:
        found: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {one_line(error)}; copy them again") from error
    return found
