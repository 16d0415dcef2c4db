"""What is hung on a module: a module that does more than its class's forward is called, never read."""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from torch.nn.modules import module as every_module

from deltatune.hf.model import is_sharded
from deltatune.subclass import is_bound

__all__ = ["OFFLOADED", "ON_INSTANCE", "hooks_inside", "hooks_of", "is_hooked", "plain_linear"]

#: Where accelerate keeps its hook on a module.
OFFLOADED: Final = "_hf_hook"

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Put into the instance: a forward of its own, and what accelerate keeps with one.
ON_INSTANCE: Final = ("forward", OFFLOADED, "_old_forward")
#: Hooks that act on every module of the process.
_GLOBAL: Final = tuple(f"_global{name}" for name in _HOOKS)
#: Hooks of these change nothing that a graph computes.
_OUR_OWN: Final = ("deltatune.", "torch.distributed.")


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of what makes a call of the module more than its class's forward on its own Parameters.

    Hooks of every kind (with keyword arguments, always called and full backward ones live in the same dictionaries), a
    forward of the instance's own, accelerate's hook, parametrised weights. Traceable.
    """
    own = module.__dict__
    # traced for every module that is read, so in few instructions: nearly always there is nothing
    hung = (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own or OFFLOADED in own or "_old_forward" in own or "parametrizations" in own["_modules"]
        or every_module._global_forward_hooks or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks or every_module._global_backward_pre_hooks
    )  # fmt: skip
    if not hung:
        return ()
    found = [name for name in _HOOKS if own.get(name)]
    found += [name for name in ON_INSTANCE if name in own and not is_bound(own[name], module)]
    if "parametrizations" in own["_modules"]:
        found.append("parametrizations")
    return *found, *(name for name in _GLOBAL if getattr(every_module, name))


def is_hooked(module: nn.Module) -> bool:
    """Whether anything is hung on this very module, not on those inside it."""
    return len(hooks_of(module)) > 0


def hooks_inside(root: nn.Module) -> list[tuple[str, Any]]:
    """What is hung on the modules under one, not on itself: each function, and before it where and how it hangs.

    The compiler guards on no hooks: one that comes, goes, or differs from layer to layer needs a graph of its own.
    """
    found = [(name, value) for name in _GLOBAL for value in getattr(every_module, name).values()]
    inside = list(root._modules.items())
    while inside:
        path, module = inside.pop()
        if module is None:
            continue
        own = module.__dict__
        # called for every layer of every call, and nearly always there is nothing
        hung = (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )
        if hung or "forward" in own:
            found += [(path + how, function) for kind in hooks_of(module) for how, function in _functions(own, kind)]
        inside += [(f"{path}.{name}", child) for name, child in own["_modules"].items()]
    return found


def _functions(own: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    if kind == "forward":  # one function bound to many modules is one
        return [(kind, getattr(own[kind], "__func__", own[kind]))]
    if kind not in _HOOKS:
        return []
    with_kwargs = own.get(f"{kind}_with_kwargs", ())
    return [
        (f"{kind} {key in with_kwargs}", function)
        for key, function in own[kind].items()
        if not str(getattr(function, "__module__", "")).startswith(_OUR_OWN)
    ]


def plain_linear(module: Any) -> bool:
    """Whether a module is its weight alone, so that its weight may be read in place of a call; frozen or not."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    linear: Any = module
    return linear.bias is None and not is_sharded(linear.weight)
