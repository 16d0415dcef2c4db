"""Forwards that tools put on an instance or a class: who did, and whether a call still reaches our class."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from deltatune.subclass import is_bound

__all__ = ["check_reached", "foreign_forward", "named", "runs_own_forward"]

#: How far a wrapper may keep the forward it calls: closures in closures, partials, decorators.
_DEPTH = 6


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


def check_reached(module: nn.Module, what: str) -> None:
    """Refuses a module of ours whose forward was replaced since, not wrapped.

    What wraps a forward holds it: in a closure, a partial, a default, or as accelerate does next to it. What takes its
    place, as a kernel from the Hub does, holds none.

    Raises:
        ValueError: with the function that is there, and what to do.
    """
    own = module.__dict__
    if "forward" in own and not _holds((own["forward"], own.get("_old_forward")), module, _DEPTH):
        raise ValueError(
            f"{what}: its forward was replaced after prepare, by {named(own['forward'])}, which keeps "
            "documents together; take it off, or let it call the forward that it found"
        )


def _holds(kept: Any, module: nn.Module, depth: int) -> bool:
    if is_bound(kept, module) or kept is type(module).forward:
        return True
    return depth > 0 and any(_holds(value, module, depth - 1) for value in _kept_by(kept))


def _kept_by(holder: Any) -> Iterator[Any]:
    if isinstance(holder, tuple | list):
        yield from holder
    elif isinstance(holder, functools.partial):
        yield from (holder.func, *holder.args, *holder.keywords.values())
    elif isinstance(holder, types.MethodType):
        yield from (holder.__func__, holder.__self__)
    elif isinstance(holder, types.FunctionType):
        yield from (cell.cell_contents for cell in holder.__closure__ or () if _filled(cell))
        yield from (*(holder.__defaults__ or ()), *(holder.__kwdefaults__ or {}).values())
        yield holder.__dict__.get("__wrapped__")
    elif callable(holder) and not isinstance(holder, nn.Module | type):
        yield from getattr(holder, "__dict__", {}).values()


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that has no value yet
        return False
