"""Keeping transformers' output-capturing hooks out of compiled graphs."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["forget_capture_hooks", "keep_capture_hooks_outside"]


def keep_capture_hooks_outside(text_model: Any, call: dict[str, Any], scope: str) -> None:
    """Makes ``output_hidden_states`` work with compiled layers.

    The first call that asks for a recorded output makes transformers put a forward hook on every module of a recordable
    class. Hooks on decoder layers run outside a per-layer graph and stay; hooks inside one read a ``ContextVar``, which
    cannot be traced, and are taken off: what they record cannot leave the graph anyway.

    Raises:
        ValueError: an output that only hooks inside the graph could record.
    """
    config = text_model.config
    wanted = [
        name
        for name in ("output_hidden_states", "output_router_logits")
        if call.get(name, getattr(config, name, False))
    ]
    outside = [] if scope == "model" else ["output_hidden_states"]
    refused = [name for name in wanted if name not in outside]
    if refused:
        raise ValueError(
            f"{refused[0]} is recorded inside the compiled graph (scope={scope!r}) and cannot be returned; "
            "leave it off (TRL turns router logits on unless SFTConfig(router_aux_loss_coef=0.0)), or prepare the "
            "model without compile"
        )
    if wanted:
        _install(text_model)
    if getattr(text_model, "_output_capturing_hooks_installed", False):
        for layer in text_model.layers:
            for module in layer.modules():
                if module is not layer or scope == "model":
                    _remove_capture_hooks(module)


def _install(text_model: Any) -> None:
    from transformers.utils import output_capturing

    output_capturing.maybe_install_capturing_hooks(text_model)


def _remove_capture_hooks(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", "").endswith("output_capturing"):
            del module._forward_hooks[key]


def forget_capture_hooks(text_model: Any) -> None:
    """Takes every recording hook off, so that transformers puts them on afresh when it needs them."""
    if not getattr(text_model, "_output_capturing_hooks_installed", False):
        return
    for module in text_model.modules():
        _remove_capture_hooks(module)
    del text_model._output_capturing_hooks_installed
