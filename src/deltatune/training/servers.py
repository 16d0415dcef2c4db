"""Adapters in the forms that inference servers read.

PEFT's own form keeps the adapters of all experts of a layer in two pairs of tensors. vLLM reads it for model types that
it flags as fused (Qwen3.5-MoE, gpt-oss, Qwen3-VL-MoE), both weights present. Per expert, as vLLM reads it for others
and SGLang for all::

    ...mlp.experts.{e}.gate_proj.lora_A.weight [r, H]    lora_B.weight [I, r]
    ...mlp.experts.{e}.up_proj.lora_A.weight   [r, H]    lora_B.weight [I, r]
    ...mlp.experts.{e}.down_proj.lora_A.weight [r, I]    lora_B.weight [H, r]

Gate and up share the A of the fused weight, and each has its rows of B; ``alpha / r`` stays what it is.
"""

# X experts, H hidden width, I width of an expert, r rank of an expert

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.hf.experts import ExpertsLayout, experts_layout

__all__ = ["LAYOUTS", "per_expert"]

#: What an adapter may be exported as.
LAYOUTS: Final = ("peft", "per-expert")

_PREFIX: Final = "base_model.model."


def per_expert(
    state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and config with one pair of matrices for each projection of each expert.

    Args:
        state: tensors by the names in PEFT's file.
        config: its ``adapter_config.json``.
        model: the base model; no storage is needed.

    Raises:
        UserError: no adapters on experts, or such of another shape than PEFT 0.19 and newer write.
    """
    experts = {path: (module, layout) for path, module in model.named_modules() if (layout := experts_layout(module))}
    found: dict[str, Tensor] = {}
    done: dict[tuple[str, str], int] = {}
    for name, tensor in state.items():
        path, wrappers, factor = _parts(name)
        if path not in experts:
            found[name] = tensor
            continue
        module, layout = experts[path]
        inner = len({n for n in state if _parts(n)[:2] == (path, 1 - wrappers)}) > 0
        weight = _weight(config, layout, path, wrappers, both=inner)
        down, up = (state[name.replace(f"lora_{factor}", f"lora_{one}")] for one in "AB")
        rank = _rank(module, layout, weight, down, up, name)
        done[path, weight] = rank
        for projection, e, a, b in _split(layout, weight, down, up, rank):
            found[f"{_PREFIX}{path}.{e}.{projection}.lora_{factor}.weight"] = (a if factor == "A" else b).clone()
    if not done:
        raise UserError("the adapter has none on routed experts; export it with --layout peft, or as it is")
    return found, _config(config, done)


def _parts(name: str) -> tuple[str, int, str]:
    """The path of the module inside, how many wrappers are around the one that the tensor is of, and A or B."""
    matched = re.fullmatch(rf"{re.escape(_PREFIX)}(.*?)((?:\.base_layer)*)\.lora_([AB])\.weight", name)
    return ("", 0, "") if matched is None else (matched[1], matched[2].count(".base_layer"), matched[3])


def _weight(config: Mapping[str, Any], layout: ExpertsLayout, path: str, wrappers: int, *, both: bool) -> str:
    """Which weight a wrapper is of: PEFT nests them in the order of registration; alone, the config names it."""
    if both:
        return layout.up if wrappers else "down_proj"
    targets = [f".{target}" for target in config.get("target_parameters") or ()]
    up = any(f".{path}.{layout.up}".endswith(target) for target in targets)
    return layout.up if up else "down_proj"


def _rank(module: Any, layout: ExpertsLayout, weight: str, down: Tensor, up: Tensor, name: str) -> int:
    stored: Tensor = getattr(module, weight)
    experts, outer, inner = (stored.mT if layout.transposed else stored).shape
    rank, rest = divmod(down.shape[0], experts)
    if rest or down.shape[1] != inner or up.shape != (outer, down.shape[0]):
        raise UserError(
            f"{name}: A {list(down.shape)} and B {list(up.shape)} are not those of {experts} experts "
            f"[{outer}, {inner}]; PEFT before 0.19 made them the other way round: load and save it there"
        )
    return rank


def _split(
    layout: ExpertsLayout, weight: str, down: Tensor, up: Tensor, rank: int
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Projection, expert, ``A [r, in]`` and ``B [out, r]``."""
    a, b = down.view(-1, rank, down.shape[1]), up.view(up.shape[0], rank, -1).permute(2, 0, 1)
    if weight == "down_proj" or not layout.gated:
        parts = {weight: b}
    elif layout.interleaved:
        parts = {"gate_proj": b[:, ::2], "up_proj": b[:, 1::2]}
    else:
        parts = dict(zip(("gate_proj", "up_proj"), torch.chunk(b, 2, dim=1), strict=True))
    for projection, of_all in parts.items():
        for e in range(a.shape[0]):
            yield projection, e, a[e], of_all[e].contiguous()


def _config(config: Mapping[str, Any], done: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Targets by the names of projections, and of each the rank and the alpha that its weight had."""
    weights = {weight for _, weight in done}
    modules = config.get("target_modules")
    if isinstance(modules, str):
        raise UserError(
            f"target_modules of the adapter are one expression, {modules}, which projections of experts cannot join"
        )
    changed = dict(config)
    left = [target for target in config.get("target_parameters") or () if target.rpartition(".")[2] not in weights]
    changed["target_parameters"] = left or None
    changed["target_modules"] = sorted({*(modules or ()), *(p for weight in weights for p in _projections(weight))})
    for field, default in (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha"))):
        given = dict(config.get(field) or {})
        own: dict[str, Any] = {}
        for (path, weight), rank in done.items():
            value = rank if field == "rank_pattern" else _matching(given, f"{path}.{weight}", default)
            for projection in _projections(weight):
                if _matching(given, f"{path}.0.{projection}", default) != value:
                    own[rf"{re.escape(path)}\.\d+\.{projection}"] = value
        # PEFT takes the first that matches
        changed[field] = own | given
    return changed


def _projections(weight: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if weight == "gate_up_proj" else (weight,)


def _matching(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """As PEFT reads patterns: the first that is the end of a key."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", key)), default)
