"""Sizes in ``parallel`` held against a checkpoint's config.json, before torch is imported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.hf.source import modeling_text
from deltatune.parallel.expert_counts import no_experts, not_divided
from deltatune.training.layer_names import text_settings
from deltatune.training.pack_ranks import check_sequence

__all__ = ["check_ranks"]

# keys of config.json that say how many routed experts a layer has
_EXPERT_COUNTS = ("num_experts", "num_local_experts")


def check_ranks(recipe: Recipe) -> None:
    """Refuses ``parallel.sequence`` and ``parallel.expert`` where a checkpoint folder's config.json tells enough.

    What it does not tell, the model's own configuration does, and the model, once their modules are imported.

    Raises:
        UserError: heads that so many ranks do not divide, or experts.
    """
    text = text_settings(recipe.model)
    if not isinstance(text.get("model_type"), str):
        return
    if recipe.parallel.sequence != 1 and _tells_heads(text):
        found: Any = SimpleNamespace(**text)
        found.get_text_config = lambda: found
        check_sequence(recipe, found)
    size = recipe.parallel.expert
    if size in (1, "auto"):
        return
    if _has_no_experts(text):
        raise UserError(f"parallel.{no_experts(int(size))}")
    counts = [text[name] for name in _EXPERT_COUNTS if type(text.get(name)) is int and text[name] > 0]
    if len(counts) == 1 and counts[0] % int(size):
        raise UserError(f"parallel.{not_divided(int(size), counts)}")


def _tells_heads(text: dict[str, Any]) -> bool:
    """Whether the numbers of heads are there: of the delta rule too, where the configuration might know more layers."""
    names = ["num_attention_heads", "num_key_value_heads"]
    if any(name.startswith(("linear_", "full_attention_interval")) for name in text):
        names += ["linear_num_value_heads", "linear_num_key_heads"]
        if not isinstance(text.get("layer_types"), list):
            return False
    return all(type(text.get(name)) is int and text[name] > 0 for name in names)


def _has_no_experts(text: dict[str, Any]) -> bool:
    """Whether the source of a type of model knows no experts at all."""
    source = modeling_text(text["model_type"].removesuffix("_text"))
    return source is not None and "expert" not in source.lower()
