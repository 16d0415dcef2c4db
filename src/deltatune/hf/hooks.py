"""What is hung on a module: a module that does more than its class's forward is called, never read."""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from torch.nn.modules import module as every_module

from deltatune.hf.model import is_sharded

__all__ = ["hooks_inside", "hooks_of", "is_hooked", "plain_linear"]

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Put into the instance: a forward of its own, and what accelerate keeps with one.
_OWN: Final = ("forward", "_hf_hook", "_old_forward")
#: Hooks that act on every module of the process.
_GLOBAL: Final = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of what makes a call of the module more than its class's forward on its own Parameters.

    Hooks of every kind (with keyword arguments, always called and full backward ones live in the same dictionaries), a
    forward of the instance's own, accelerate's hook, parametrised weights. Traceable.
    """
    own = module.__dict__
    found = [name for name in _HOOKS if own.get(name)]
    found += [name for name in _OWN if name in own]
    if "parametrizations" in own["_modules"]:
        found.append("parametrizations")
    found += [name for name in _GLOBAL if getattr(every_module, name)]
    return tuple(found)


def is_hooked(module: nn.Module) -> bool:
    """Whether anything is hung on this very module, not on those inside it."""
    return len(hooks_of(module)) > 0


def hooks_inside(module: nn.Module) -> tuple[object, ...]:
    """What is hung on the modules inside a module, to tell apart its graphs by; empty where nothing is.

    The compiler reads hooks and forwards of instances once, while it captures, and looks for no others later.
    """
    found: list[object] = []
    for place, inner in enumerate(module.modules()):
        own = inner.__dict__
        if place and (any(own.get(name) for name in _HOOKS) or "forward" in own):
            # handles count up, so that no other hook ever has this one's
            found.append((place, *(tuple(own.get(name) or ()) for name in _HOOKS), own.get("forward")))
    return tuple(found)


def plain_linear(module: Any) -> bool:
    """Whether a module is its weight alone, so that its weight may be read in place of a call; frozen or not."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    linear: Any = module
    return linear.bias is None and not is_sharded(linear.weight)
