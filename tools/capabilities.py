"""What goes together with which axis of processes, asked of the code that a plan and ``parallelize`` ask.

Nothing here says yes or no. A cell is a recipe of two processes (four, of two axes) that goes the way of ``deltatune
plan`` (schema, rules, sizes, ``prepare``) and then of ``parallelize``, with a small model, in one process that is told
it were one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.shapes import shape_named
from deltatune import parallelize
from deltatune.config.rules import SHARDED_OPTIMIZERS, check_recipe
from deltatune.config.schema import DataSection, ParallelSection, Recipe
from deltatune.hf.model import base_model
from deltatune.lora.mode import is_lora_linear, mode_of
from deltatune.packing.sequences import Sequences
from deltatune.parallel.sequence import sequence_group_of, shard_sequence
from deltatune.parallel.state import reshard
from deltatune.preparation import Prepared
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.changes import find_changes
from deltatune.training.checkpoint import empty_model, new_model
from deltatune.training.layout import sizes_of
from deltatune.training.loading import host_lines
from deltatune.training.planned import prepare_by_recipe
from tools.processes import as_rank

__all__ = ["AXES", "NEEDS", "Axis", "Need", "capabilities", "cell"]

_SIZE: Final = 2  # of an axis
_TOKENS: Final = 1024
_CALLED: Final = 64  # tokens of a call that is made


@dataclass(frozen=True)
class Axis:
    """A column.

    Attributes:
        name: its head.
        section: of ``parallel``, as recipes have it or would have it.
        sizes: what ``parallelize`` takes.
        states: Gated DeltaNet passes states on, as ``shard_sequence`` is asked afterwards.
    """

    name: str
    section: Mapping[str, int | str]
    sizes: Mapping[str, int]
    states: bool = False

    @property
    def in_recipes(self) -> bool:
        """Whether the section has such keys."""
        return self.section.keys() <= ParallelSection.model_fields.keys()


_SHARD: Final = Axis("`shard`", {"shard": _SIZE}, {"shard": _SIZE})
_HEADS: Final = Axis("`sequence`, heads", {"sequence": _SIZE}, {"sequence": _SIZE})
_EXPERT: Final = Axis("`expert`", {"expert": _SIZE}, {"expert": _SIZE})
AXES: Final = (
    Axis("`replicate`", {"replicate": _SIZE}, {}),
    _SHARD,
    _HEADS,
    Axis("`sequence`, states", {"sequence": _SIZE, "recurrent": "state"}, {"sequence": _SIZE}, states=True),
    _EXPERT,
)
"""Every column."""


@dataclass(frozen=True)
class Need:
    """A row.

    Attributes:
        name: what a run needs, as the page says it.
        recipe: what it says beside a small recipe, by section.
        shape: of ``benchmarks.shapes``, or transformers' name of another model; None for a hybrid, with experts where
            they are divided.
        config: what the model's config says otherwise.
        of_run: what only recipes have, such as an optimizer by name; a loop of one's own does it in its own way.
        beside: another axis.
        images: some ranks' calls bring them, and the tower that reads them ...
        resumed: a run goes on from another size of the axis.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    shape: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    of_run: bool = False
    beside: Axis | None = None
    images: Literal["frozen", "trained"] | None = None
    resumed: bool = False


_FULL: Final = {"lora": None}
_ROUTED: Final = {"lora": {"target_modules": None, "target_parameters": "all-experts"}}
#: A model with layers of attention alone.
_SMALL: Final = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_TOWER: Final = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}


def _run(name: str, **recipe: Any) -> Need:
    return Need(name, recipe, of_run=True)


NEEDS: Final[Sequence[Need]] = (
    Need("full fine-tuning", _FULL),
    Need("chosen weights (`training.unfrozen_parameters`)", {**_FULL, "training": {"unfrozen_parameters": ["norm"]}}),
    Need("a head tied to the embedding, trained", _FULL, config={"tie_word_embeddings": True}),
    Need("LoRA", {"lora": {"impl": "stock"}}),
    Need("LoRA, `impl: fused`", {"lora": {"impl": "fused"}}),
    Need("LoRA on experts", _ROUTED, "tiny-moe"),
    Need("LoRA that begins in base weights: `pissa`, `olora`", {"lora": {"init_lora_weights": "pissa"}}),
    Need("LoRA with `use_dora`", {"lora": {"use_dora": True}}),
    Need("LoRA with a head that trains whole", {"lora": {"modules_to_save": ["lm_head"]}}),
    Need("dense hybrids (Qwen3.5)", shape="tiny"),
    Need("hybrids with experts (Qwen3-Next, Qwen3.5-MoE)", _FULL, "tiny-moe"),
    Need("a router's auxiliary loss", _FULL, "tiny-moe", {"output_router_logits": True}),
    Need("families of attention alone (Qwen3)", shape="qwen3", config=_SMALL),
    Need("other decoders (Llama, Mistral and so on)", shape="llama", config=_SMALL),
    Need("images in some ranks' calls, for a frozen tower", images="frozen"),
    Need("images in some ranks' calls, for a tower that trains", images="trained"),
    Need("`compile.scope: layer`", {"compile": True}),
    Need("`compile.scope: model`", {"compile": {"scope": "model"}}),
    Need("`checkpointing: layer`", {"checkpointing": "layer"}),
    Need("`checkpointing`, a share", {"checkpointing": 0.5, "compile": True}),
    Need("`checkpointing: auto`", {"checkpointing": "auto"}),
    _run("`activation_offloading`", activation_offloading=True),
    _run("`training.bf16`", training={"bf16": True}),
    _run("`training.fp16`", training={"fp16": True}),
    *(_run(f"`optim: {name}`", training={"optim": name}) for name in SHARDED_OPTIMIZERS),
    *(_run(f"`optim: {name}`", training={"optim": name}) for name in ("muon", "adamw_8bit", "adafactor")),
    _run("`training.learning_rates`", training={"learning_rates": {"q_proj": 1e-3}}),
    _run("`gradient_accumulation_steps`", training={"gradient_accumulation_steps": 2}),
    _run("`on_nonfinite: skip`", training={"on_nonfinite": "skip"}),
    _run("preference pairs", preference={}, data={"overlong": "drop"}),
    _run("streams of data", data={"streaming": True}, training={"max_steps": 1}),
    _run(
        "`samples` at evaluations",
        data={"val_size": 0.5},
        training={"eval_strategy": "epoch"},
        samples={"prompts": ["?"]},
    ),
    Need("going on with another size, as many packs in a step", of_run=True, resumed=True),
    *(Need(f"beside {axis.name}", beside=axis) for axis in (_SHARD, _HEADS, _EXPERT)),
)
"""Every row; optimizers of which the same is true become one."""

_YES, _NO, _LIBRARY, _NOT_ASKED = "yes", "no", "library", "-"


def capabilities() -> list[str]:
    """The table, and the reasons under it by number, as lines of Markdown."""
    reasons: list[str] = []
    rows: list[tuple[list[str], list[str]]] = []
    for need in NEEDS:
        cells = []
        for axis in AXES:
            text, reason = cell(need, axis)
            if reason is not None:
                reasons += [] if reason in reasons else [reason]
                text += f" ({reasons.index(reason) + 1})"
            cells.append(text)
        if rows and cells == rows[-1][1] and need.name.startswith("`optim:"):
            rows[-1][0].append(need.name.replace("optim: ", ""))
        else:
            rows.append(([need.name], cells))
    header = ("", *(axis.name for axis in AXES))
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join((', '.join(names), *cells))} |" for names, cells in rows]
    return [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]


def cell(need: Need, axis: Axis) -> tuple[str, str | None]:
    """``yes``, ``no``, ``library``, or ``-`` where there is no question; and the reason, or what is to be known."""
    axes = [axis] if need.beside is None else [axis, need.beside]
    if need.beside is not None and need.beside.sizes.keys() == axis.sizes.keys():
        return _NOT_ASKED, None
    sees = need.images is None or "image_root" in DataSection.model_fields
    in_recipes = sees and all(each.in_recipes for each in axes)
    if not in_recipes and need.of_run:
        return _NOT_ASKED, None
    if need.resumed:
        before, now = ({"parallel": dict.fromkeys(axis.section, size)} for size in (1, _SIZE))
        acts = all(change.verdict == "acts" for change in find_changes(before, now))
        return (_YES if acts else _NO), None
    with as_rank(0, _SIZE ** len(axes)):
        try:
            return (_YES if in_recipes else _LIBRARY), _plain(_asked(need, axes, in_recipes=in_recipes), need)
        except ValueError as error:  # of the schema, of rules and of the library
            return _NO, _plain(str(error), need)


def _asked(need: Need, axes: Sequence[Axis], *, in_recipes: bool) -> str | None:
    """What is to be known of a combination that nothing refuses.

    Raises:
        ValueError: it is refused.
    """
    section = {name: value for axis in axes for name, value in axis.section.items()} if in_recipes else {}
    recipe = Recipe.model_validate(_recipe(need, section))
    check_recipe(recipe)
    config = _config(need, axes)
    if in_recipes:
        # as of a plan elsewhere, with as many processes as the recipe says
        planning: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1)
        empty = adapt_by_recipe(empty_model(recipe.model, config), recipe)
        sizes_of(recipe, empty, planning, _SIZE ** len(axes))
    model = adapt_by_recipe(new_model(recipe.model, config), recipe)
    if need.images is not None:
        base_model(model).model.visual.requires_grad_(need.images == "trained")
    prepared = prepare_by_recipe(recipe, model)
    sizes = {name: size for axis in axes for name, size in axis.sizes.items()}
    _divide(prepared, sizes, states=any(axis.states for axis in axes))
    if need.images is not None:
        _check_images(model)
    divided = max(sizes.get("shard", 1), sizes.get("expert", 1)) > 1
    return _unfused(recipe, model) or "; ".join(host_lines(recipe, model) if divided else []) or None


def _divide(prepared: Prepared, sizes: Mapping[str, int], *, states: bool) -> None:
    asked: Any = sizes
    mesh = parallelize(prepared, **asked).mesh
    if states:
        shard_sequence(prepared, mesh.sequence_group("cpu"), recurrent="state")


def _check_images(model: nn.Module) -> None:
    """Checks that a rank sends the same with images as without."""
    config = base_model(model).config
    group, tower = sequence_group_of(model), config.vision_config
    tokens = torch.zeros(1, _CALLED, dtype=torch.long)
    text = {"input_ids": tokens, "sequences": Sequences.from_lengths([_CALLED * (1 if group is None else group.size)])}
    shown = tokens.clone()
    shown[0, :4] = config.image_token_id
    image = {
        "input_ids": shown,
        "mm_token_type_ids": (shown == config.image_token_id).long(),
        "pixel_values": torch.zeros(16, tower.in_channels * tower.temporal_patch_size * tower.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    sent = []
    for call in ({**text, **image}, text):
        with profile(activities=[ProfilerActivity.CPU]) as run, torch.no_grad():
            model(**call)
        reshard(model)
        sent.append({event.key: event.count for event in run.key_averages() if "c10d" in event.key})
    if sent[0] != sent[1]:
        raise ValueError("a rank whose call brings images waits for the others, whose calls bring none")


def _unfused(recipe: Recipe, model: nn.Module) -> str:
    """Why adapters do not run as the recipe says."""
    if recipe.lora is None or recipe.lora.impl != "fused":
        return ""
    modes = {mode_of(module, "fused") for module in model.modules() if is_lora_linear(module)}
    return "; ".join(sorted(f"unfused: {mode.reason}" for mode in modes if mode.name != "fused"))


def _recipe(need: Need, section: Mapping[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"name_or_path": "model", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "packing": {"tokens_per_batch": _TOKENS},
        "lora": {"r": 4},
        "training": {"output_dir": "outputs"},
        "parallel": dict(section),
    }
    for name, value in need.recipe.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, Mapping) else value
    return base


def _config(need: Need, axes: Sequence[Axis]) -> Any:
    if need.config.keys() >= _SMALL.keys():
        return AutoConfig.for_model(need.shape, **need.config)
    config = shape_named(need.shape or ("tiny-moe" if _EXPERT in axes else "tiny")).config()
    config.num_hidden_layers, config.layer_types = 2, ["linear_attention", "full_attention"]
    for name, value in need.config.items():
        setattr(config, name, value)
    if need.images is None:
        return config
    whole = config.model_type.removesuffix("_text")
    made = AutoConfig.for_model(whole, text_config=config.to_dict(), vision_config=_TOWER, image_token_id=1)
    made.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[whole]]
    return made


def _plain(reason: str | None, need: Need) -> str | None:
    """Without what is the trial's alone: sizes, bytes, which of several optimizers."""
    if reason is None:
        return None
    reason = re.sub(r"^(parallel\.)?(shard|sequence|expert)(=|: )\d+: ", "", reason)
    reason = re.sub(r"(sequence|expert)=\d+", r"\1", reason)
    optimizer = need.recipe.get("training", {}).get("optim")
    return re.sub(r", [\d.]+ GiB", "", reason.replace(f"optim: {optimizer}", "optim"))
