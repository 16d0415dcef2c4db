"""Tokens that are added, and tokens that take a role."""

from __future__ import annotations

from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings, alone, other
from deltatune.importing.values import is_off, mapping, text, texts

__all__ = ["added_tokens", "role_of", "roles", "tokens"]

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_KNOWN = "it has to be in the vocabulary, or in model.added_tokens"


def role_of(name: str) -> Rule:
    """One token's role."""

    @alone
    def rule(value: Any) -> Outcome:
        if is_off(value):
            return Outcome("no effect here", why="not set")
        return Outcome("carried", {f"model.special_tokens.{name}": text(value)}, _KNOWN)

    return rule


@alone
def roles(value: Any) -> Outcome:
    """Axolotl's ``special_tokens``: roles and the tokens that take them."""
    given = {role: token for role, token in mapping(value or {}).items() if not is_off(token)}
    if not given:
        return Outcome("no effect here", why="not set")
    writes = {f"model.special_tokens.{role}": text(token) for role, token in given.items() if role in _ROLES}
    if others := [role for role in given if role not in _ROLES]:
        return Outcome("not supported", writes, f"{others[0]}: add such tokens to model.added_tokens")
    return Outcome("carried", writes, _KNOWN)


def tokens(value: Any, settings: Settings) -> Outcome:
    """Axolotl's ``tokens``: a list of new ones, or of old files roles and the tokens that take them."""
    return (roles if isinstance(value, dict) else added_tokens("tokens"))(value, settings)


def added_tokens(*keys: str) -> Rule:
    """New tokens, of all of these keys together."""

    def rule(value: Any, settings: Settings) -> Outcome:
        if is_off(value):
            return Outcome("no effect here", why="not set")
        texts(value)
        given = [token for key in keys if not is_off(settings.get(key)) for token in other(settings, key, texts)]
        return Outcome(
            "carried", {"model.added_tokens": list(dict.fromkeys(given))}, "beside adapters their rows train"
        )

    return rule
