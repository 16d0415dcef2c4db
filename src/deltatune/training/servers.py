"""Adapters in the forms that inference servers read.

What is specified here, from the sources of vLLM (main line of summer 2026) and SGLang (the same), neither of which is
run here:

- **Scale.** Both multiply every product by ``lora_alpha / r`` of the config and read no patterns; SGLang reads no
  ``use_rslora``. So where scales differ, B takes its own up, and ``lora_alpha`` is ``r``.
- **PEFT's form** keeps the adapters of all experts of a layer in two pairs of tensors, the outer of ``down_proj``. vLLM
  reads it for model types that it flags as fused (``is_3d_moe_weight``: Qwen3.5-MoE, gpt-oss, Qwen3-VL-MoE), both
  weights present; SGLang does not.
- **Per expert**, as vLLM reads it for the other types, and for the flagged ones with
  ``--enable-mixed-moe-lora-format``; SGLang for all::

    ...mlp.experts.{e}.gate_proj.lora_A.weight [r, H]    lora_B.weight [I, r]
    ...mlp.experts.{e}.up_proj.lora_A.weight   [r, H]    lora_B.weight [I, r]
    ...mlp.experts.{e}.down_proj.lora_A.weight [r, I]    lora_B.weight [H, r]

  Gate and up share the A of the fused weight, and each has its rows of B. vLLM asserts that each expert has all of its
  projections, so those without adapters get zeros. The names are those of the checkpoint, by which both servers know
  their modules: ``block_sparse_moe.experts.{e}.w1``, ``w3`` and ``w2`` of Mixtral.
"""

# X experts, H hidden width, I width of an expert, r rank of an expert

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.hf.experts import CheckpointNames, checkpoint_names
from deltatune.hf.peft import targeted_parameters
from deltatune.training.expert_adapters import ExpertPair, expert_pairs

__all__ = ["LAYOUTS", "has_scales_of_its_own", "one_scale", "per_expert"]

#: What an adapter may be exported as.
LAYOUTS: Final = ("peft", "per-expert")

_PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(r"\.lora_(embedding_)?[AB](\.weight|\.bias)?$")
_FUSED: Final = r".*\.gate_up_proj"
_UP_FACTOR: Final = re.compile(r"\.lora_(embedding_)?B(\.weight|\.bias)?$")


def has_scales_of_its_own(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's scales may be others than ``lora_alpha / r``."""
    return any(config.get(field) for field in ("rank_pattern", "alpha_pattern", "use_rslora"))


def one_scale(
    state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and config with every scale in B and ``lora_alpha = r``; unchanged where it has one scale.

    Args:
        state: tensors by the names in PEFT's file.
        config: its ``adapter_config.json``.
        model: the base model, where the adapter has ``target_parameters``; no storage is needed.
    """
    ranks, alphas = (dict(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern"))
    parameters = {} if model is None else targeted_parameters(model, config.get("target_parameters") or ())
    root = bool(config.get("use_rslora"))
    scales = {}
    for name in filter(_UP_FACTOR.search, state):
        key = _key(name, parameters)
        rank = _matching(ranks, key, config.get("r"))
        scales[name] = _matching(alphas, key, config.get("lora_alpha")) / (rank**0.5 if root else rank)
    if not root and all(scale == config["lora_alpha"] / config["r"] for scale in scales.values()):
        return dict(state), dict(config)
    found = {name: tensor * scales[name] if name in scales else tensor for name, tensor in state.items()}
    return found, {**config, "lora_alpha": config["r"], "alpha_pattern": ranks, "use_rslora": False}


def _key(name: str, parameters: Mapping[str, list[str]]) -> str:
    """What PEFT holds patterns against for a tensor: the path of its module, or the name of its Parameter."""
    path, *wrappers = _FACTOR.sub("", name).removeprefix(_PREFIX).split(".base_layer")
    targeted = parameters.get(path)
    return path if targeted is None else f"{path}.{targeted[-1 - len(wrappers)]}"


def per_expert(
    state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and config with one pair of matrices for each projection of each expert.

    Args:
        state: tensors by the names in PEFT's file.
        config: its ``adapter_config.json``.
        model: the base model; no storage is needed.

    Raises:
        UserError: no adapters on experts, or such of another shape than PEFT 0.19.1 and newer write.
    """
    pairs, names = expert_pairs(state, config, model), checkpoint_names(model)
    if not pairs:
        raise UserError("the adapter has none on routed experts; export it with --layout peft, or as it is")
    split = {name for pair in pairs for name in (pair.a, pair.b)}
    found = {_renamed(name, names): tensor for name, tensor in state.items() if name not in split}
    ranks = {}
    for pair in pairs:
        ranks[pair.path, pair.weight] = _rank(pair, state)
        for projection, e, a, b in _split(pair, state):
            prefix = f"{_PREFIX}{_path(pair.path, e, projection, names)}"
            found |= {f"{prefix}.lora_A.weight": a.clone(), f"{prefix}.lora_B.weight": b.clone()}
    for pair in pairs:
        other = "down_proj" if pair.weight != "down_proj" else pair.layout.up
        if (pair.path, other) not in ranks:
            found |= _nothing(pair, other, state, names)
            ranks[pair.path, other] = ranks[pair.path, pair.weight]
    return found, _config(config, ranks, {pair.weight for pair in pairs}, names)


def _rank(pair: ExpertPair, state: Mapping[str, Tensor]) -> int:
    experts, outer, inner = pair.shape
    down, up = state[pair.a], state[pair.b]
    rank, rest = divmod(down.shape[0], experts)
    if rest or down.shape[1] != inner or up.shape != (outer, down.shape[0]):
        raise UserError(
            f"{pair.a}: A {list(down.shape)} and B {list(up.shape)} are not those of {experts} experts "
            f"[{outer}, {inner}]; the adapter is of another model, or of another version of PEFT than its config says"
        )
    return rank


def _split(pair: ExpertPair, state: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Projection, expert, ``A [r, in]`` and ``B [out, r]``."""
    down, up, rank = state[pair.a], state[pair.b], _rank(pair, state)
    a, b = down.view(-1, rank, down.shape[1]), up.view(up.shape[0], rank, -1).permute(2, 0, 1)
    projections = _projections(pair.weight)
    if len(projections) == 1:
        parts: tuple[Tensor, ...] = (b,)
    elif pair.layout.interleaved:
        parts = b[:, ::2], b[:, 1::2]
    else:
        parts = torch.chunk(b, 2, dim=1)
    for projection, of_all in zip(projections, parts, strict=True):
        for e in range(a.shape[0]):
            yield projection, e, a[e], of_all[e].contiguous()


def _nothing(pair: ExpertPair, weight: str, state: Mapping[str, Tensor], names: CheckpointNames) -> dict[str, Tensor]:
    """Adapters of an expert's other weight that add nothing, of the rank and dtype of the one that it has."""
    (experts, outer, inner), rank = pair.shape, _rank(pair, state)
    # H and I, from whichever weight is there
    hidden, width = (inner, outer // len(_projections(pair.weight))) if weight == "down_proj" else (outer, inner)
    ins, outs = (width, hidden) if weight == "down_proj" else (hidden, width)
    found = {}
    for e in range(experts):
        for projection in _projections(weight):
            prefix = f"{_PREFIX}{_path(pair.path, e, projection, names)}"
            found[f"{prefix}.lora_A.weight"] = state[pair.a].new_zeros(rank, ins)
            found[f"{prefix}.lora_B.weight"] = state[pair.b].new_zeros(outs, rank)
    return found


def _config(
    config: Mapping[str, Any], ranks: Mapping[tuple[str, str], int], adapted: set[str], names: CheckpointNames
) -> dict[str, Any]:
    """Targets by the names of projections, and of each the rank and the alpha that its weight had, for PEFT."""
    weights = {weight for _, weight in ranks}
    modules = config.get("target_modules")
    if isinstance(modules, str):
        raise UserError(
            f"target_modules of the adapter are one expression, {modules}, which projections of experts cannot join"
        )
    changed = dict(config)
    left = [target for target in config.get("target_parameters") or () if target.rpartition(".")[2] not in adapted]
    changed["target_parameters"] = left or None
    own_names = {names.projections.get(p, p) for weight in weights for p in _projections(weight)}
    changed["target_modules"] = sorted({*(modules or ()), *own_names})
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        given = dict(config.get(field) or {})
        own: dict[str, Any] = {}
        for (path, weight), rank in ranks.items():
            value = rank if field == "rank_pattern" else _matching(given, f"{path}.{weight}", default)
            for projection in _projections(weight):
                served = _path(path, 0, projection, names)
                if _matching(given, served, default) != value:
                    before, _, last = served.rpartition(".0.")
                    own[rf"{re.escape(before)}\.\d+\.{last}"] = value
            # PEFT reads gate and up as one fused adapter of twice the rank and the alpha, and its own pattern is last
            fused = f"{path}.gate_up_proj"
            if weight == "gate_up_proj" and 2 * value != _matching({**given, _FUSED: 2 * default}, fused, None):
                own[re.escape(fused)] = 2 * value
        # PEFT takes the first that matches
        changed[field] = own | given
    return changed


def _projections(weight: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if weight == "gate_up_proj" else (weight,)


def _path(path: str, expert: int, projection: str, names: CheckpointNames) -> str:
    return f"{_renamed(path, names)}.{expert}.{names.projections.get(projection, projection)}"


def _renamed(name: str, names: CheckpointNames) -> str:
    for ours, theirs in names.parts.items():
        name = name.replace(ours, theirs)
    return name


def _matching(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """As PEFT reads patterns: the first that is the end of a key."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", key)), default)
