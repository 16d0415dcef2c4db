"""Forwards that tools put on an instance or a class: who did, and what."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from deltatune.subclass import Swapped, is_bound

__all__ = ["foreign_forward", "named", "replaced_since", "runs_own_forward"]


def foreign_forward(module: nn.Module) -> str | None:
    """What was put in place of a class's forward, on this instance, and would never call another class's; or None.

    A bound method of the module's class is that class's own: ``swap`` rebinds it. accelerate's hook calls what it keeps
    as ``_old_forward``, which ``swap`` rebinds as well.
    """
    own = module.__dict__
    put = own.get("forward")
    if "_old_forward" in own and getattr(getattr(put, "func", None), "__module__", "") == "accelerate.hooks":
        put = own["_old_forward"]
    if put is None or is_bound(put, module):
        return None
    return named(put)


def named(put: Any) -> str:
    """Module and name of a function, inside partials and bound methods."""
    while isinstance(put, functools.partial | types.MethodType):
        put = put.func if isinstance(put, functools.partial) else put.__func__
    return f"{getattr(put, '__module__', '?')}.{getattr(put, '__qualname__', type(put).__name__)}"


def runs_own_forward(module: nn.Module) -> bool:
    """Whether the forward is the one that its class was written with, neither replaced there nor on the instance."""
    cls = type(module)
    return getattr(cls.forward, "__module__", None) == cls.__module__ and foreign_forward(module) is None


def replaced_since(module: Swapped) -> str | None:
    """What stands in place of the forward of a module of ours, and may call it or not; or None."""
    forward, put = type(module).forward, module.__dict__.get("forward")
    if forward is not type(module)._own_forward:  # on its class, or on one that took its place
        return named(forward)
    return None if is_bound(getattr(put, "_torchdynamo_orig_callable", put), module) else foreign_forward(module)
