"""Which tokens a tokenizer has, from its files alone: what is wrong with them is found before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltatune.config.schema import ModelSection, Recipe
from deltatune.errors import UserError, nearest, user_path
from deltatune.training.layer_names import json_of, text_settings

__all__ = ["beyond_embeddings", "check_new_tokens", "check_padding", "grows", "rows_of_files", "vocabulary_of_files"]


def grows(recipe: Recipe) -> bool:
    """Whether embeddings get a row for each token of the tokenizer, those that they lack included."""
    return recipe.model.added_tokens is not None or (recipe.lora is not None and recipe.lora.name_or_path is not None)


def rows_of_files(recipe: Recipe) -> int | None:
    """The rows of the embedding as a checkpoint's config.json says them; None where they grow, or it does not."""
    size = text_settings(recipe.model).get("vocab_size")
    return size if type(size) is int and not grows(recipe) else None


def vocabulary_of_files(section: ModelSection) -> Mapping[str, int] | None:
    """Tokens and their ids; None for a tokenizer that is not here, or of which transformers may make another.

    That is one with code of its own, without ``tokenizer.json``, or whose settings name a token that is not in it.
    """
    folder = user_path(section.tokenizer or section.name_or_path)
    saved, settings = json_of(folder / "tokenizer.json"), json_of(folder / "tokenizer_config.json")
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not isinstance(settings, dict) or section.trust_remote_code:
        return None
    listed = model.get("vocab")
    pairs = [] if not isinstance(listed, list) else [(entry[0], index) for index, entry in enumerate(listed)]
    found = dict(listed) if isinstance(listed, dict) else dict(pairs)
    assert isinstance(saved, dict)
    found |= {str(entry["content"]): int(entry["id"]) for entry in saved.get("added_tokens") or ()}
    others = [*_named(settings), *_named(json_of(folder / "special_tokens_map.json"))]
    extra = json_of(folder / "added_tokens.json")
    others += list(extra) if isinstance(extra, dict) else []
    return None if "auto_map" in settings or not found or not found.keys() >= set(others) else found


def check_new_tokens(section: ModelSection, known: Mapping[str, int]) -> None:
    """``added_tokens`` and ``special_tokens`` against the tokens that there are.

    Raises:
        UserError: an added token that is in the vocabulary, or a special one that is in neither.
    """
    added = section.added_tokens or ()
    for token in added:
        if token in known:
            raise UserError(f"model.added_tokens: {token} is in the vocabulary already ({known[token]}); leave it out")
    for role, token in (section.special_tokens or {}).items():
        if token not in known and token not in added:
            raise UserError(
                f"model.special_tokens.{role}: {token} is not in the vocabulary{nearest(token, known)}; name one that "
                "is, or add it to model.added_tokens"
            )


def check_padding(section: ModelSection, known: Mapping[str, int], rows: int) -> None:
    """The token that fills packs, as the tokenizer's settings or the recipe name it.

    Raises:
        UserError: the embedding has no row for it.
    """
    folder = user_path(section.tokenizer or section.name_or_path)
    given = _roles(json_of(folder / "tokenizer_config.json")) | dict(section.special_tokens or {})
    token = given.get("pad_token", given.get("eos_token", ""))
    if known.get(token, 0) >= rows:
        raise UserError(beyond_embeddings("packs are filled with", known[token], rows, token))


def beyond_embeddings(what: str, token: int, rows: int, name: object = None) -> str:
    """That a model has no embedding for a token, with the remedy."""
    named = "" if name is None else f" ({name!r})"
    return (
        f"{what} token {token}{named}, and the model has {rows} embeddings; take the tokenizer "
        "that belongs to it (model.tokenizer), or a checkpoint whose embeddings were resized"
    )


def _roles(settings: object) -> dict[str, str]:
    """Roles such as ``pad_token``, and their tokens."""
    given = settings if isinstance(settings, dict) else {}
    found = {name: _content(value) for name, value in given.items() if name.endswith("_token")}
    return {name: token for name, token in found.items() if token is not None}


def _named(settings: object) -> Iterator[str]:
    """All tokens that settings name."""
    yield from _roles(settings).values()
    given = settings if isinstance(settings, dict) else {}
    lists = [given.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    entries: list[Any] = [entry for listed in lists if isinstance(listed, list) for entry in listed]
    for mapped in (given.get("added_tokens_decoder"), given.get("extra_special_tokens")):
        entries += list(mapped.values()) if isinstance(mapped, dict) else []
    yield from (token for token in map(_content, entries) if token is not None)


def _content(value: object) -> str | None:
    """The text of a token, which may be written with its settings."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None
