"""Adapters of routed experts in PEFT's files: which tensors are of which weight, and in which roles.

PEFT from 0.19.1 on reads the linear map off the experts' layout. PEFT 0.18 took the first of a weight's two dimensions
for the input, whatever the layout: with ``[X, F, H]`` it wrote factors of the transposed map, which are today's with A
and B in each other's place::

    0.18      A [X r, F], B [H, r X]      W_e += s (B_e A_e)^T
    0.19.1    A [X r, H], B [F, r X]      W_e += s  B_e A_e

Transposed weights ``[X, H, F]`` (gpt-oss) have the same files in both, and 0.17 knew no others. PEFT 0.19.0 read the
layout the wrong way round: its factors are in each other's place with both.
"""

# X experts, H hidden width, F width before the gate, r rank of an expert

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.hf.experts import ExpertsLayout, experts_layout

__all__ = ["ExpertPair", "current_roles", "expert_pairs", "may_be_old", "refuse_old_roles"]

_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class ExpertPair:
    """A and B of one weight of a layer's experts.

    Attributes:
        path: of the experts.
        layout: theirs.
        weight: the name of the weight, ``gate_up_proj``, ``up_proj`` or ``down_proj``.
        shape: ``(X, out, in)`` of the linear map, however it is stored.
        a, b: the names of the tensors.
    """

    path: str
    layout: ExpertsLayout
    weight: str
    shape: tuple[int, int, int]
    a: str
    b: str


def expert_pairs(state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> list[ExpertPair]:
    """The pairs of an adapter that are of experts.

    Args:
        state: tensors by the names in PEFT's file.
        config: its ``adapter_config.json``.
        model: the base model, with adapters or without; no storage is needed.
    """
    experts = {
        path.removeprefix(_PREFIX).replace(".base_layer", ""): (module, layout)
        for path, module in model.named_modules()
        if (layout := experts_layout(module))
    }
    wrapped: dict[str, dict[int, dict[str, str]]] = {}
    for name in state:
        path, wrappers, factor = _parts(name)
        if path in experts:
            wrapped.setdefault(path, {}).setdefault(wrappers, {})[factor] = name
    found = []
    for path, of_path in wrapped.items():
        module, layout = experts[path]
        for wrappers, names in of_path.items():
            if names.keys() == {"A", "B"}:
                weight = _weight(config, layout, path, wrappers, both=len(of_path) > 1)
                stored: Tensor = getattr(module, weight)
                groups, outer, inner = (stored.mT if layout.transposed else stored).shape
                found.append(ExpertPair(path, layout, weight, (groups, outer, inner), names["A"], names["B"]))
    return found


def may_be_old(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's config does not say that PEFT 0.19.1 or newer wrote it; before 0.18 it says nothing."""
    version = _version(config)
    return version is None or version < (0, 19, 1)


def _version(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("peft_version") or ""))
    return None if found is None else tuple(int(part or 0) for part in found.groups())


def current_roles(state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors as PEFT from 0.19.1 on reads them.

    Raises:
        UserError: a file of PEFT 0.18 or 0.19.0 whose shapes agree with both.
    """
    pairs = expert_pairs(state, config, model)
    found = dict(state)
    if not _are_old(pairs, state, config):
        return found
    for pair in pairs:
        groups, outer, inner = pair.shape
        a, b = state[pair.a], state[pair.b]
        found[pair.a] = b.view(inner, -1, groups).permute(2, 1, 0).reshape(-1, inner)
        found[pair.b] = a.view(groups, -1, outer).permute(2, 1, 0).reshape(outer, -1)
    return found


def refuse_old_roles(state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, folder: object) -> None:
    """Refuses what PEFT of today would find to have other shapes, with what to do about it.

    Raises:
        UserError: factors of experts in the roles of PEFT 0.18 and 0.19.0.
    """
    if _are_old(expert_pairs(state, config, model), state, config):
        raise UserError(
            f"{folder}: A and B of its experts are in each other's place, as PEFT {config.get('peft_version', '0.18')} "
            f"wrote them; deltatune export {folder} --output NEW --layout peft writes them as PEFT reads them since "
            "0.19.1"
        )


def _are_old(pairs: list[ExpertPair], state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a file is of PEFT 0.18 or 0.19.0 and holds other roles than today's: one version wrote all of it."""
    if not may_be_old(config):
        return False
    version = _version(config) or (0, 17, 0)
    fits: set[tuple[bool, bool]] = set()
    for pair in pairs:
        groups, outer, inner = pair.shape
        ends = state[pair.b].shape[0], state[pair.a].shape[1]
        if state[pair.a].shape[0] % groups == 0 and state[pair.a].shape[0] == state[pair.b].shape[1]:
            # as today's, as those of the old version; 0.18 gave a transposed weight the same as today's
            as_old = ends == (inner, outer) and (version >= (0, 19) or not pair.layout.transposed)
            fits.add((ends == (outer, inner), as_old))
    if fits == {(True, True)} and version >= (0, 18):
        raise UserError(
            f"PEFT {config['peft_version']} wrote this adapter of experts, whose weights are square: whether A and B "
            "are in each other's place depends on the transformers that it ran with, and nothing in the file tells; "
            "merge it there"
        )
    return bool(fits) and all(old for _, old in fits) and not all(now for now, _ in fits)


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
