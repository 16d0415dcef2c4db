"""The routed experts of transformers' mixtures: fused three-dimensional weights, and how a class lays them out."""

# X experts, H hidden width, I width of an expert, F width before the gate: 2 I with a gate

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

__all__ = [
    "PART",
    "CheckpointNames",
    "ExpertsLayout",
    "checkpoint_names",
    "experts_layout",
    "experts_per_token",
    "has_divided_experts",
    "other_experts",
    "routed_parameters",
]

#: The attribute of experts whose weights are those of a part of them, the others lying on other ranks.
PART: Final = "_deltatune_part"

#: What configs call k.
_PER_TOKEN: Final = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class ExpertsLayout:
    """How fused experts store two linear layers, as transformers' decorator notes it on every instance.

    Attributes:
        up: the name of the first weight, ``"gate_up_proj"`` or ``"up_proj"``.
        transposed: weights are ``[X, H, F]`` and ``[X, I, H]``, otherwise ``[X, F, H]`` and ``[X, H, I]``.
        interleaved: gate and up alternate, gate first; otherwise the gate's half comes first.
        biased: there are ``[X, F]`` and ``[X, H]`` under the weights' names with ``_bias``.
        gated: ``_apply_gate`` makes I of F; otherwise ``act_fn`` of each.
    """

    up: str
    transposed: bool
    interleaved: bool
    biased: bool
    gated: bool


def experts_layout(module: Any) -> ExpertsLayout | None:
    """The layout of experts that are called with tokens ``[T, H]``, ids and weights ``[T, k]``; None for all else.

    Classes without the decorator's notes may be called otherwise; those that norm each expert's output do more than two
    linear layers.
    """
    own: dict[str, Any] = module.__dict__
    gated, transposed = own.get("has_gate"), own.get("is_transposed")
    if not isinstance(module, nn.Module) or gated is None or transposed is None or own.get("has_post_expert_norm"):
        return None
    if own.get("_is_expert_parallel"):
        return None
    layout = ExpertsLayout(
        "gate_up_proj" if gated else "up_proj",
        bool(transposed),
        gated and not own.get("is_concatenated", True),
        bool(own.get("has_bias")),
        bool(gated),
    )
    weights = (layout.up, "down_proj")
    names = [*weights, *(f"{name}_bias" for name in weights if layout.biased)]
    found = [getattr(module, name, None) for name in names]
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in found):
        return None
    if not callable(getattr(module, "_apply_gate" if gated else "act_fn", None)):
        return None
    return layout if [tensor.ndim for tensor in found if tensor is not None] == [3, 3, 2, 2][: len(found)] else None


def experts_per_token(config: Any, num_experts: int) -> int:
    """The experts that a token goes to; all of them where the config has no name for it that is known."""
    return next((int(getattr(config, name)) for name in _PER_TOKEN if getattr(config, name, None)), num_experts)


def has_divided_experts(module: nn.Module) -> bool:
    """Whether ranks hold experts of the module together."""
    return any(PART in part.__dict__ for part in module.modules())


def other_experts(text_model: nn.Module) -> dict[str, int]:
    """Classes of modules that hold weights of several experts in a layout that is not known, and how many there are."""
    found: dict[str, int] = {}
    for module in text_model.modules():
        stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
        if stacked and not isinstance(module, nn.modules.conv._ConvNd) and experts_layout(module) is None:
            found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
    return found


def routed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Weights and biases of routed experts, and the factors of their adapters."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        inside: Any = module
        while hasattr(inside, "parameter_name"):  # of PEFT's wrappers around a Parameter
            inside = inside.base_layer
        if experts_layout(inside) is None:
            continue
        if inside is module:
            found |= {*module.parameters(recurse=False)}
        else:
            wrapper: Any = module
            found |= {*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters()}
    return found


@dataclass(frozen=True)
class CheckpointNames:
    """What a family's checkpoints, and programs that read them, call parts of a model.

    Attributes:
        projections: ``gate_proj``, ``up_proj`` and ``down_proj`` of one expert, where they have other names there.
        parts: parts of paths, ``".mlp."`` of Mixtral's ``".block_sparse_moe."``.
    """

    projections: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)


def checkpoint_names(model: Any) -> CheckpointNames:
    """The names of single experts in the checkpoints of a model's type, off transformers' conversions."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # with all of distributed tensors

    names = CheckpointNames()
    for config in (model.config, model.config.get_text_config()):
        for conversion in get_checkpoint_conversion_mapping(config.model_type) or ():
            theirs, ours = list(conversion.source_patterns), list(conversion.target_patterns)
            single = [re.search(r"\bexperts\.\*\.(\w+)\.weight$", source) for source in theirs]
            fused = ours[0].rpartition("experts.")[2] if len(ours) == 1 else ""
            own = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
            if all(single) and len(single) == len(own):
                names.projections.update({o: m[1] for o, m in zip(own, single, strict=True) if m and m[1] != o})
            elif len(theirs) == len(ours) == 1 and all(re.fullmatch(r"\.\w+\.", part) for part in theirs + ours):
                names.parts[ours[0]] = theirs[0]
    return names
