"""accelerate's offloading: weights that come to their device when a module is called, for modules that we read."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from deltatune.hf.forwards import foreign_forward
from deltatune.hf.hooks import OFFLOADED, hooks_of
from deltatune.hf.peft import trained_copy

__all__ = ["offload_hook", "readable_conv"]

_ACCELERATE: Final = {"forward", OFFLOADED, "_old_forward"}


def offload_hook(module: nn.Module) -> Any:
    """accelerate's hook on a module, whose ``pre_forward`` and ``post_forward`` belong around a read; or None."""
    return module.__dict__.get(OFFLOADED)


def readable_conv(module: nn.Module) -> nn.Module:
    """The convolution whose weights a fused op reads, through what PEFT put around it.

    It is never called: the stock layer does not call it either, and its own padding knows no documents.

    Raises:
        ValueError: an adapter, hooks, or another tool's forward, which the op would ignore.
    """
    inner = trained_copy(module)
    hung = {*hooks_of(inner), *hooks_of(module)} - {"parametrizations"}
    if offload_hook(inner) is not None and foreign_forward(inner) is None:
        hung -= _ACCELERATE
    if hasattr(inner, "base_layer"):
        hung.add(f"an adapter ({type(inner).__name__})")
    if hung or not isinstance(inner, nn.Conv1d):
        raise ValueError(
            f"a {type(inner).__name__} with {', '.join(sorted(hung)) or 'a forward of its own'} is read by a fused op, "
            "which would ignore that; leave norms and convolutions out of the adapter, hang it on the layer around the "
            "convolution, or train the convolution whole with modules_to_save"
        )
    return inner
