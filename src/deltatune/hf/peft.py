"""What PEFT may have wrapped around a module or a model: weights read through it, virtual tokens refused."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from deltatune.hf.forwards import foreign_forward
from deltatune.hf.hooks import OFFLOADED, ON_INSTANCE, hooks_of, is_hooked, plain_linear

__all__ = [
    "head_weight",
    "readable",
    "readable_conv",
    "refuse_prompt_learning",
    "refuse_virtual_tokens",
    "taken_for_experts",
    "targeted_parameters",
    "trained_copy",
]


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


def head_weight(head: nn.Module) -> Tensor | None:
    """The weight ``[V, E]`` that a linear head multiplies with; None where something else comes in, and it is called.

    Rows that PEFT trains apart (``trainable_token_indices``) are put in, once for a call, as their layer does.
    """
    inner: Any = trained_copy(head)
    if plain_linear(inner):
        weight: Tensor = inner.weight
        return weight
    rows: Any = getattr(inner, "token_adapter", None)
    if not type(rows).__module__.startswith("peft.tuners.trainable_tokens.") or any(map(is_hooked, inner.modules())):
        return None
    if rows.disable_adapters or rows.merged or not rows.active_adapters or not plain_linear(rows.base_layer):
        return None
    merged: Tensor = rows.get_merged_weights(rows.active_adapters)
    return merged


def readable(module: nn.Module, owner: type[nn.Module]) -> nn.Module | None:
    """``trained_copy`` of a module whose weights a fused op reads in place of a call; None where it must be called.

    It is called where anything is hung on it, or on PEFT's wrapper around it, and where it is of another module than
    ``owner``, the stock class whose forward calls it: another tool's class computes what it likes.

    Raises:
        ValueError: an adapter around the module, which the op would ignore.
    """
    inner = trained_copy(module)
    if hasattr(inner, "base_layer"):
        raise ValueError(
            f"{type(inner).__name__} adapts a module whose weights a fused op reads, and would be ignored; leave "
            "norms and convolutions out of the adapter, or train them whole with modules_to_save"
        )
    cls = type(inner)
    known = cls.__module__ == owner.__module__ == cls.forward.__module__
    return inner if known and not is_hooked(inner) and not is_hooked(module) else None


def readable_conv(module: nn.Module) -> nn.Module:
    """The convolution whose weights a fused op reads, through what PEFT put around it.

    It is never called: the stock layer does not call it either, and its own padding knows no documents.

    Raises:
        ValueError: an adapter, hooks, or another tool's forward, which the op would ignore.
    """
    inner = trained_copy(module)
    hung = {*hooks_of(inner), *hooks_of(module)} - {"parametrizations"}
    if OFFLOADED in inner.__dict__ and foreign_forward(inner) is None:
        hung -= {*ON_INSTANCE}  # whose ``pre_forward`` and ``post_forward`` belong around a read
    if hasattr(inner, "base_layer"):
        hung.add(f"an adapter ({type(inner).__name__})")
    if hung or not isinstance(inner, nn.Conv1d):
        raise ValueError(
            f"a {type(inner).__name__} with {', '.join(sorted(hung)) or 'a forward of its own'} is read by a fused op, "
            "which would ignore that; leave norms and convolutions out of the adapter, hang it on the layer around the "
            "convolution, or train the convolution whole with modules_to_save"
        )
    return inner


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


def refuse_virtual_tokens() -> None:
    """``refuse_prompt_learning`` for PeftModels whose forward calls this: nothing in a call tells, nor on the model."""
    for frame, _ in traceback.walk_stack(None):
        if frame.f_code.co_name == "forward" and frame.f_globals.get("__name__") == "peft.peft_model":
            refuse_prompt_learning(frame.f_locals.get("self"))


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names, these and its own, that PEFT takes for the routed experts, whatever linear layers have them; often none.

    For model types whose experts were linear layers in transformers 4 it reads ``gate_proj``, ``up_proj`` and
    ``down_proj`` in ``target_modules`` as the fused weights, at the end of any path, and drops shared experts and dense
    MLPs of these names.
    """
    import peft
    from peft.utils import transformers_weight_conversion as conversion

    config = peft.LoraConfig(target_modules=sorted(set(names) | {"gate_proj", "up_proj", "down_proj"}))
    given = set(config.target_modules or ())
    conversion.convert_peft_config_for_transformers(config, model, None)
    return given - set(config.target_modules or ())


def targeted_parameters(model: nn.Module, targets: Collection[str]) -> dict[str, list[str]]:
    """Names of the Parameters that ``target_parameters`` select, by the paths of their modules, as PEFT finds them.

    They are in the order of registration, in which PEFT nests its wrappers: the last is outermost. PEFT holds the keys
    of ``rank_pattern`` and ``alpha_pattern`` against path and name together, also where the name is ``weight``.
    """
    endings = tuple(f".{target}" for target in targets)
    found = {
        path: [name for name, _ in module.named_parameters(recurse=False) if f".{path}.{name}".endswith(endings)]
        for path, module in model.named_modules()
    }
    return {path: names for path, names in found.items() if names}
