"""How many ranks can hold one pack together, from a model's config alone."""

# P ranks, R heads that read (query heads, value heads), H heads that are read (key-value heads, key heads)

from __future__ import annotations

from typing import Any

from deltatune.errors import UserError
from deltatune.layers.rotary import depends_on_length
from deltatune.models.registry import FAMILIES

__all__ = ["check_sequence_size", "sequence_sizes"]


def sequence_sizes(config: Any) -> tuple[int, ...]:
    """The sizes P of a sequence group that a model can be in, ascending, 1 among them.

    P divides R, and P and H divide one another one way or the other, for attention and for the delta rule: then every
    rank has as many heads as any other, and its reading heads share its read ones as those of one process do.

    Args:
        config: of a transformers model, or of its text model.
    """
    text = config.get_text_config()
    if _refusal(text) is not None:
        return (1,)
    heads = _heads(text)
    largest = min(readers for readers, _ in heads)
    return tuple(size for size in range(1, largest + 1) if all(_fits(size, *pair) for pair in heads))


def check_sequence_size(config: Any, size: int) -> None:
    """Checks that a model can be in a sequence group of so many ranks.

    Raises:
        UserError: it cannot; with the reason, or the sizes that it can.
    """
    text = config.get_text_config()
    if size == 1:
        return
    refusal = _refusal(text)
    if refusal is not None:
        raise UserError(f"sequence={size}: {refusal}; set sequence to 1")
    sizes = sequence_sizes(config)
    if size not in sizes:
        heads = " and ".join(f"{readers} heads that read {read}" for readers, read in _heads(text))
        choices = ", ".join(map(str, sizes))
        raise UserError(f"sequence={size} does not divide {heads} evenly among ranks; set sequence to one of {choices}")


def _fits(size: int, readers: int, read: int) -> bool:
    return readers % size == 0 and (read % size == 0 or size % read == 0)


def _heads(text: Any) -> list[tuple[int, int]]:
    """``(R, H)`` of attention, and of the delta rule where there is one."""
    found = [(text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)]
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        found.append((text.linear_num_value_heads, text.linear_num_key_heads))
    return found


def _refusal(text: Any) -> str | None:
    """Why a model's packs cannot be spread over ranks."""
    if text.model_type not in {family.model_type for family in FAMILIES}:
        known = ", ".join(family.name for family in FAMILIES)
        return (
            f"{text.model_type} runs on attention of its own, which sees the tokens of one rank alone (families that "
            f"can: {known})"
        )
    kind = next(filter(depends_on_length, _rope_types(text)), None)
    if kind is None:
        return None
    return f"rope_type {kind!r} has frequencies by the length of a document, of which a rank has a part"


def _rope_types(text: Any) -> list[str]:
    """Of every type of layer, where they differ."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    by_layer = [of_type for of_type in parameters.values() if isinstance(of_type, dict)]
    return [str(of_type.get("rope_type", "default")) for of_type in by_layer or [parameters]]
