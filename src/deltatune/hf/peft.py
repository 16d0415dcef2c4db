"""What PEFT may have wrapped around a module or a model: weights read through it, virtual tokens refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

__all__ = ["readable", "refuse_prompt_learning", "refuse_virtual_tokens", "trained_copy"]

#: Calls between PEFT's forward and that of the model inside it, two for each module call, and some room.
_FRAMES: Final = 10


def trained_copy(module: nn.Module) -> nn.Module:
    """The module whose weights act in a forward: PEFT's active copy where ``modules_to_save`` made one.

    The wrapper PEFT puts there forwards attribute reads to the original, frozen module, so a fused op that read
    ``wrapper.weight`` would silently ignore what is trained.
    """
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in getattr(module, "active_adapters", []) if name in copies]
    if getattr(module, "disable_adapters", False) or not active:
        return module.get_submodule("original_module")
    return copies[active[0]]


def readable(module: nn.Module) -> nn.Module:
    """``trained_copy`` of a module whose weights a fused op reads.

    Raises:
        ValueError: an adapter around the module, which the op would ignore.
    """
    module = trained_copy(module)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{type(module).__name__} adapts a module whose weights a fused op reads, and would be ignored; leave "
            "norms and convolutions out of the adapter, or train them whole with modules_to_save"
        )
    return module


def refuse_prompt_learning(model: Any) -> None:
    """Refuses adapters that put virtual tokens in front of a row (prompt, p- and prefix tuning and their kin).

    Raises:
        ValueError: such an adapter in a PeftModel's ``peft_config``.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"adapter {name!r} is of type {kind}: PEFT puts its virtual tokens in front of a row and drops the "
                "position ids, so the documents of a pack would become one; use LoRA, or leave the model unprepared"
            )


def refuse_virtual_tokens(call: Mapping[str, Any]) -> None:
    """Refuses a call that comes from a PeftModel with such an adapter, put around the model after ``prepare``.

    PEFT leaves no trace of itself on the model inside, nor in the call, so its forward is looked for among the callers.
    """
    peft = sys.modules.get("peft")
    if peft is None or torch.compiler.is_compiling():
        return
    if call.get("inputs_embeds") is None and call.get("past_key_values") is None:
        return
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return
        frame = frame.f_back
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(caller, peft.PeftModel):
            refuse_prompt_learning(caller)
            return
