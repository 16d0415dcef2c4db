"""Keeping transformers' output-capturing hooks out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["forget_capture_hooks", "keep_capture_hooks_outside"]


def keep_capture_hooks_outside(
    text_model: Any, call: dict[str, Any], scope: str, *, routers: Callable[[], bool]
) -> bool:
    """Makes ``output_hidden_states`` work with compiled layers; says whether router logits are asked for.

    The first call that asks for a recorded output makes transformers put a forward hook on every module of a recordable
    class. Hooks on decoder layers run outside a per-layer graph and stay; hooks inside one read a ``ContextVar``, which
    cannot be traced, and are taken off. With ``routers`` the logits of these are outputs of the compiled layers; what
    else such hooks record cannot leave the graph.

    Raises:
        ValueError: an output that only hooks inside the graph could record.
    """
    names = ("output_hidden_states", "output_router_logits")
    wanted = [name for name in names if call.get(name, getattr(text_model.config, name, False))]
    refused = [name for name in wanted if scope == "model" or (name != "output_hidden_states" and not routers())]
    if refused:
        raise ValueError(
            f"{refused[0]} is recorded inside the compiled graph (scope={scope!r}) and cannot be returned; "
            "leave it off (TRL turns router logits on unless SFTConfig(router_aux_loss_coef=0.0)), or prepare the "
            "model without compile"
        )
    if wanted:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        maybe_install_capturing_hooks(text_model)
    if getattr(text_model, "_output_capturing_hooks_installed", False):
        outside = set(text_model.layers) if scope == "layer" else set()
        for layer in text_model.layers:
            _remove_capture_hooks(set(layer.modules()) - outside)
    return names[1] in wanted


def forget_capture_hooks(text_model: Any) -> None:
    """Takes every recording hook off, so that transformers puts them on afresh when it needs them."""
    if getattr(text_model, "_output_capturing_hooks_installed", False):
        _remove_capture_hooks(text_model.modules())
        del text_model._output_capturing_hooks_installed


def _remove_capture_hooks(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "").endswith("output_capturing"):
                del module._forward_hooks[key]
