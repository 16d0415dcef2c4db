"""How many ranks can hold one pack together, from a model's config alone."""

# P ranks, R heads that read (query heads, value heads), H heads that are read (key-value heads, key heads)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltatune.errors import UserError
from deltatune.layers.rope_types import depends_on_length
from deltatune.models.names import FAMILY_NAMES

if TYPE_CHECKING:
    from deltatune.packing.group import Recurrent

__all__ = ["check_sequence_size", "sequence_sizes", "stateless"]


def sequence_sizes(config: Any, recurrent: Recurrent = "heads") -> tuple[int, ...]:
    """The sizes P of a sequence group that a model can be in, ascending, 1 among them.

    P divides R, and P and H divide one another one way or the other, for attention and, unless its layers pass states
    on, for the delta rule: then every rank has as many heads as any other, and its reading heads share its read ones as
    those of one process do.

    Args:
        config: of a transformers model, or of its text model.
        recurrent: how recurrent layers are divided; see ``shard_sequence``.
    """
    text = config.get_text_config()
    if _refusal(text, recurrent) is not None:
        return (1,)
    heads = _heads(text, recurrent)
    largest = min(readers for readers, _ in heads)
    return tuple(size for size in range(1, largest + 1) if all(_fits(size, *pair) for pair in heads))


def check_sequence_size(config: Any, size: int, recurrent: Recurrent = "heads") -> None:
    """Checks that a model can be in a sequence group of so many ranks, its recurrent layers divided so.

    Raises:
        UserError: it cannot; with the reason, or the sizes that it can.
    """
    text = config.get_text_config()
    if size == 1:
        return
    refusal = _refusal(text, recurrent)
    if refusal is not None:
        raise UserError(f"sequence={size}: {refusal}")
    sizes = sequence_sizes(config, recurrent)
    if size not in sizes:
        heads = " and ".join(f"{readers} heads that read {read}" for readers, read in _heads(text, recurrent))
        choices = ", ".join(map(str, sizes))
        raise UserError(f"sequence={size} does not divide {heads} evenly among ranks; set sequence to one of {choices}")


def stateless(config: Any) -> str | None:
    """Why a model has no state that ranks could pass on; None where it has one."""
    text = config.get_text_config()
    if _is_recurrent(text):
        return None
    return f"{text.model_type} has no recurrent layer whose state could be passed on"


def _fits(size: int, readers: int, read: int) -> bool:
    return readers % size == 0 and (read % size == 0 or size % read == 0)


def _heads(text: Any, recurrent: Recurrent) -> list[tuple[int, int]]:
    """``(R, H)`` of attention, and of the delta rule where its heads are divided."""
    found = [(text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)]
    if _is_recurrent(text) and recurrent == "heads":
        found.append((text.linear_num_value_heads, text.linear_num_key_heads))
    return found


def _is_recurrent(text: Any) -> bool:
    return "linear_attention" in (getattr(text, "layer_types", None) or ())


def _refusal(text: Any, recurrent: Recurrent) -> str | None:
    """Why a model's packs cannot be spread over ranks, with the remedy."""
    if text.model_type not in FAMILY_NAMES:
        known = ", ".join(FAMILY_NAMES.values())
        return (
            f"{text.model_type} runs on attention of its own, which sees the tokens of one rank alone (families that "
            f"can: {known}); set sequence to 1"
        )
    if recurrent == "state" and (why := stateless(text)) is not None:
        return f"{why}; leave recurrent='state' out"
    kind = next(filter(depends_on_length, _rope_types(text)), None)
    if kind is None:
        return None
    return (
        f"rope_type {kind!r} has frequencies by the length of a document, of which a rank has a part; set sequence to 1"
    )


def _rope_types(text: Any) -> list[str]:
    """Of every type of layer, where they differ."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    by_layer = [of_type for of_type in parameters.values() if isinstance(of_type, dict)]
    return [str(of_type.get("rope_type", "default")) for of_type in by_layer or [parameters]]
